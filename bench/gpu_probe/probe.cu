// Names to kernels, and launches. Nothing is timed here: gpu_probe.py does that, on the stream it passes in.
#include <cuda_runtime.h>

#include <map>
#include <string>
#include <vector>

#include "decode.cuh"
#include "memory.cuh"
#include "probe.h"
#include "rates.cuh"

namespace {

struct Kernel {
  const void* function;
  Work work;
  int shared_bytes;
  void (*on_host)(const Decode&);
};

template <class Operation>
Kernel rate() {
  const Work work = {THREADS, Operation::per_step * STEPS};
  return {reinterpret_cast<const void*>(rate_loop<Operation>), work, Operation::shared_bytes};
}

template <class Decoder>
void decode_on_host(const Decode& args) {
  std::vector<uint32_t> table(Decoder::table_bytes / 4);
  Decoder::fill(args.levels, table.data(), 0, 1);
  const Decoder decoder(args.levels, table.data(), 0);
  Store store(args);
  for (int unit = 0; unit <= args.mask; unit++) {
    uint32_t words[4 * Decoder::vectors];
    load_unit<Decoder::vectors>(words, args.packed, unit);
    for (int i = 0; i < Decoder::eights; i++) store.take(unit, i, Decoder::eights, decoder.eight(words, i));
  }
}

template <class Decoder, class Consumer>
Kernel decode() {
  const Work work = {THREADS, UNITS_PER_TURN<Decoder>, 16 * Decoder::vectors, 8 * Decoder::eights};
  const auto function = reinterpret_cast<const void*>(decode_loop<Decoder, Consumer>);
  return {function, work, Decoder::table_bytes, decode_on_host<Decoder>};
}

template <class Args>
Kernel memory(void (*function)(Args), int threads, int codes_per_block = 0) {
  return {reinterpret_cast<const void*>(function), {threads, 0, 0, codes_per_block}};
}

const std::map<std::string, Kernel> KERNELS = {
    {"rate/prmt", rate<Registers<Prmt>>()},
    {"rate/lop3", rate<Registers<Lop3>>()},
    {"rate/shfl", rate<Registers<Shfl>>()},
    {"rate/hfma2", rate<Registers<Hfma2>>()},
    {"rate/bfma2", rate<Registers<Bfma2>>()},
    {"rate/pair_32k", rate<PairTable<128>>()},
    {"rate/pair_64k", rate<PairTable<256>>()},
    {"rate/hmma", rate<TensorCore>()},
    {"decode/raw", decode<Raw, FeedTensorCores>()},
    {"decode/nf4_prmt", decode<Nf4Prmt, FeedTensorCores>()},
    {"decode/nf3_prmt", decode<Nf3Prmt, FeedTensorCores>()},
    {"decode/nf2_prmt", decode<Nf2Prmt, FeedTensorCores>()},
    {"decode/nf4_pair_32k", decode<Nf4Pair<128>, FeedTensorCores>()},
    {"decode/nf4_pair_64k", decode<Nf4Pair<256>, FeedTensorCores>()},
    {"decode/int4_lop3", decode<Int4Lop3, FeedTensorCores>()},
    {"decode/nf4_shuffle", decode<Nf4Shuffle, FeedTensorCores>()},
    {"check/raw", decode<Raw, Store>()},
    {"check/nf4_prmt", decode<Nf4Prmt, Store>()},
    {"check/nf3_prmt", decode<Nf3Prmt, Store>()},
    {"check/nf2_prmt", decode<Nf2Prmt, Store>()},
    {"check/nf4_pair_32k", decode<Nf4Pair<128>, Store>()},
    {"check/nf4_pair_64k", decode<Nf4Pair<256>, Store>()},
    {"check/int4_lop3", decode<Int4Lop3, Store>()},
    {"check/nf4_shuffle", decode<Nf4Shuffle, Store>()},
    {"linear/read", memory(read_linear, MOVE_THREADS)},
    {"linear/write", memory(write_linear, MOVE_THREADS)},
    {"rows/linear_32", memory(read_rows<Pattern::linear, uint2>, ROW_THREADS)},
    {"rows/linear_64", memory(read_rows<Pattern::linear, uint4>, ROW_THREADS)},
    {"rows/sliced_32", memory(read_rows<Pattern::sliced, uint2>, ROW_THREADS)},
    {"rows/sliced_64", memory(read_rows<Pattern::sliced, uint4>, ROW_THREADS)},
    {"rows/interleaved_32", memory(read_rows<Pattern::interleaved, uint2>, ROW_THREADS)},
    {"rows/interleaved_64", memory(read_rows<Pattern::interleaved, uint4>, ROW_THREADS)},
    {"dequantize", memory(dequantize_nf4, MOVE_THREADS, 8 * MOVE_VECTORS * MOVE_THREADS)},
};

const char* UNKNOWN = "there is no kernel of that name";

const Kernel* find(const char* name) {
  const auto found = KERNELS.find(name);
  return found == KERNELS.end() ? nullptr : &found->second;
}

}  // namespace

const char* probe_sources() { return PROBE_SOURCES; }

const char* probe_work(const char* name, Work* work) {
  const Kernel* kernel = find(name);
  if (!kernel) return UNKNOWN;
  *work = kernel->work;
  return nullptr;
}

const char* probe_launch(const char* name, const void* args, int32_t blocks, void* stream) {
  const Kernel* kernel = find(name);
  if (!kernel) return UNKNOWN;
  if (kernel->shared_bytes > 48 * 1024)  // beyond 48 KB a kernel must ask; a refusal shows as a failed launch
    cudaFuncSetAttribute(kernel->function, cudaFuncAttributeMaxDynamicSharedMemorySize, kernel->shared_bytes);
  void* parameters[] = {const_cast<void*>(args)};
  cudaLaunchKernel(kernel->function, dim3(blocks), dim3(kernel->work.threads), parameters, kernel->shared_bytes,
                   static_cast<cudaStream_t>(stream));
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

const char* probe_decode_on_host(const char* name, const Decode* args) {
  const Kernel* kernel = find(name);
  if (!kernel || !kernel->on_host) return UNKNOWN;
  kernel->on_host(*args);
  return nullptr;
}

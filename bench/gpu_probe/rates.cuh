// How many of one instruction a multiprocessor finishes per clock. A thread advances a few register chains, long enough
// a turn that the loop itself does not count; the chains mix, so that the assembler cannot fold two steps into one.
#pragma once
#include "probe.h"
#include "ptx.cuh"

constexpr int CHAINS = 8;
constexpr int STEPS = 16;  // steps of every chain per loop turn

#define THREE_INPUTS(name, instruction)                                        \
  struct name {                                                                \
    __device__ uint32_t operator()(uint32_t a, uint32_t b, uint32_t c) const { \
      asm volatile(instruction : "+r"(a) : "r"(b), "r"(c));                    \
      return a;                                                                \
    }                                                                          \
  };
THREE_INPUTS(Prmt, "prmt.b32 %0, %0, %1, %2;")
THREE_INPUTS(Lop3, "lop3.b32 %0, %0, %1, %2, 0xE8;")  // majority: no shorter form
THREE_INPUTS(Hfma2, "fma.rn.f16x2 %0, %0, %1, %2;")
THREE_INPUTS(Bfma2, "fma.rn.bf16x2 %0, %0, %1, %2;")
THREE_INPUTS(Shfl, "shfl.sync.idx.b32 %0, %0, %1, 0x1f, 0xffffffff;  // %2")

template <class Instruction>
struct Registers {
  static constexpr int per_step = CHAINS, shared_bytes = 0;
  uint32_t chain[CHAINS];
  __device__ Registers(const Rate& rate, uint32_t*) {
    for (int i = 0; i < CHAINS; i++) chain[i] = (threadIdx.x + rate.turns) * 0x9e3779b9u + i * 0x85ebca6bu;
  }
  __device__ void step() {
    for (int i = 0; i < CHAINS; i++)
      chain[i] = Instruction()(chain[i], chain[(i + 1) % CHAINS], chain[(i + 3) % CHAINS]);
  }
  __device__ uint32_t result() const {
    uint32_t all = 0;
    for (uint32_t word : chain) all ^= word;
    return all;
  }
};

// Lookups in a decoder's pair table, each word read picking the next entry: a byte names one of 256 entries, each
// present once per bank. Stride 256 (64 KB): one PRMT puts the byte beside the lane. Stride 128 (32 KB): a shift and a
// LOP3.
template <int stride>
struct PairTable : Registers<Prmt> {
  static constexpr int shared_bytes = 256 * stride;
  const char* table;
  __device__ PairTable(const Rate& rate, uint32_t* shared)
      : Registers(rate, shared), table(reinterpret_cast<const char*>(shared)) {
    for (int i = threadIdx.x; i < shared_bytes / 4; i += THREADS) shared[i] = i * 0x9e3779b9u;
  }
  __device__ void step() {
    const uint32_t lane4 = threadIdx.x % 32 * 4;
    for (uint32_t& word : chain) {
      const uint32_t at = stride == 256 ? ptx::prmt(word, lane4, 0x5514) : ptx::and_or(word >> 1, 0x7f80u, lane4);
      word = *reinterpret_cast<const uint32_t*>(table + at);
    }
  }
};

struct TensorCore {  // four accumulators a warp: the latency of one hides behind the others and behind 31 more warps
  static constexpr int per_step = 4, shared_bytes = 0;
  float sum[4][4] = {};
  uint32_t a[4], b[2];
  __device__ TensorCore(const Rate& rate, uint32_t*) {
    for (uint32_t& word : a) word = 0x3f003e80u ^ ((threadIdx.x + rate.turns) & 0x7f);  // bf16 0.25 and 0.5, mixed
    for (uint32_t& word : b) word = 0x3e80bf00u ^ (threadIdx.x & 0x7f);
  }
  __device__ void step() {
    for (auto& one : sum) ptx::mma_bf16(one, a, b);
  }
  __device__ uint32_t result() const { return __float_as_uint(sum[0][0] + sum[1][1] + sum[2][2] + sum[3][3]); }
};

template <class Operation>
__global__ void __launch_bounds__(THREADS, 1) rate_loop(const __grid_constant__ Rate rate) {
  extern __shared__ uint32_t shared[];
  Operation operation(rate, shared);
  __syncthreads();
  const int64_t start = clock64();
  for (int turn = 0; turn < rate.turns; turn++) {
#pragma unroll
    for (int i = 0; i < STEPS; i++) operation.step();
  }
  __syncthreads();
  if (threadIdx.x == 0) static_cast<int64_t*>(rate.cycles)[blockIdx.x] = clock64() - start;
  static_cast<uint32_t*>(rate.sink)[blockIdx.x * THREADS + threadIdx.x] = operation.result();
}

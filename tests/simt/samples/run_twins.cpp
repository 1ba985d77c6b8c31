// One small kernel per instruction of ptx.cuh and ptx_more.cuh, for test_simt_twins.py.
#include <array>
#include <utility>

#include "ptx_more.cuh"

namespace ptx = qft::ptx;

namespace {

const char* outcome(bool ok) { return ok ? nullptr : simt::error(); }

constexpr int kWords = 256;

__global__ void prmt(const uint32_t* low, const uint32_t* high, const uint32_t* selectors, uint32_t* result) {
  const int i = threadIdx.x;
  result[i] = ptx::prmt(low[i], high[i], selectors[i]);
}

template <int table>
__device__ uint32_t lop3_of(uint32_t a, uint32_t b, uint32_t c) {
  return ptx::lop3<table>(a, b, c);
}

using Lop3 = uint32_t (*)(uint32_t, uint32_t, uint32_t);
template <size_t... tables>
constexpr std::array<Lop3, sizeof...(tables)> every_lop3(std::index_sequence<tables...>) {
  return {lop3_of<tables>...};
}

__global__ void lop3(const uint32_t* words, uint32_t* result) {  // thread t: table t
  static constexpr auto functions = every_lop3(std::make_index_sequence<kWords>());
  result[threadIdx.x] = functions[threadIdx.x](words[0], words[1], words[2]);
}

// Lane t copies t bytes (lanes 0..16) over a tile of ones.
__global__ void zero_fill(const uint4* source, uint4* result) {
  DYN_SMEM(shared, 16);
  const int t = threadIdx.x;
  uint4* const tile = reinterpret_cast<uint4*>(shared);
  tile[t] = make_uint4(~0u, ~0u, ~0u, ~0u);
  ptx::cp_async16(ptx::smem_u32(tile + t), source + t, t);
  ptx::cp_commit();
  ptx::cp_wait<0>();
  result[t] = tile[t];
}

// What lane t finds where its first, then its second copy goes: before any wait, after a wait for all but one group,
// and after a wait for all.
__global__ void lateness(const uint32_t* source, uint32_t* result) {
  DYN_SMEM(shared, 16);
  const int t = threadIdx.x;
  uint32_t* const tile = reinterpret_cast<uint32_t*>(shared) + 8 * t;
  for (int i = 0; i < 2; i++) {
    ptx::cp_async16(ptx::smem_u32(tile + 4 * i), source + 8 * t + 4 * i);
    ptx::cp_commit();
  }
  for (int i = 0; i < 2; i++) result[6 * t + i] = tile[4 * i];
  ptx::cp_wait<1>();
  for (int i = 0; i < 2; i++) result[6 * t + 2 + i] = tile[4 * i];
  ptx::cp_wait<0>();
  for (int i = 0; i < 2; i++) result[6 * t + 4 + i] = tile[4 * i];
}

enum class Meeting { together, half_absent, two_places };

template <typename T, Meeting meeting>
__global__ void mma(const uint32_t* a, const uint32_t* b, float* c) {
  const int t = threadIdx.x;
  const uint32_t my_a[4] = {a[4 * t], a[4 * t + 1], a[4 * t + 2], a[4 * t + 3]}, my_b[2] = {b[2 * t], b[2 * t + 1]};
  float my_c[4] = {c[4 * t], c[4 * t + 1], c[4 * t + 2], c[4 * t + 3]};
  if (meeting == Meeting::together || t < 16)
    ptx::mma_m16n8k16<T>(my_c, my_a, my_b);
  else if (meeting == Meeting::two_places)
    ptx::mma_m16n8k16<T>(my_c, my_a, my_b);
  for (int i = 0; i < 4; i++) c[4 * t + i] = my_c[i];
}

template <bool transposed>
__global__ void ldmatrix(const uint4* rows, uint32_t* result) {  // lane t gives the address of row 31 - t
  DYN_SMEM(shared, 16);
  const int t = threadIdx.x;
  reinterpret_cast<uint4*>(shared)[t] = rows[31 - t];
  __syncwarp();
  uint32_t registers[4];
  ptx::ldmatrix_x4<transposed>(registers, ptx::smem_u32(shared) + 16 * (31 - t));
  for (int j = 0; j < 4; j++) result[4 * t + j] = registers[j];
}

template <typename In, typename Out>
const char* one_warp(void (*kernel)(const In*, Out*), const void* in, size_t in_bytes, void* out, size_t out_bytes) {
  simt::clear_buffers();
  simt::add_buffer(in, in_bytes, "in");
  simt::add_buffer(out, out_bytes, "out", simt::OUT);
  return outcome(simt::launch(kernel, 1, 32, 1024, static_cast<const In*>(in), static_cast<Out*>(out)));
}

}  // namespace

SIMT_EXPORT const char* run_prmt(const uint32_t* low, const uint32_t* high, const uint32_t* selectors, uint32_t* out) {
  simt::clear_buffers();
  for (const uint32_t* in : {low, high, selectors}) simt::add_buffer(in, 4 * kWords, "in");
  simt::add_buffer(out, 4 * kWords, "out", simt::OUT);
  return outcome(simt::launch(prmt, 1, kWords, 0, low, high, selectors, out));
}

SIMT_EXPORT const char* run_lop3(const uint32_t* words, uint32_t* out) {
  simt::clear_buffers();
  simt::add_buffer(words, 12, "words");
  simt::add_buffer(out, 4 * kWords, "out", simt::OUT);
  return outcome(simt::launch(lop3, 1, kWords, 0, words, out));
}

SIMT_EXPORT const char* run_zero_fill(const void* in, void* out) {
  simt::clear_buffers();
  simt::add_buffer(in, 17 * 16, "in");
  simt::add_buffer(out, 17 * 16, "out", simt::OUT);
  return outcome(simt::launch(zero_fill, 1, 17, 272, static_cast<const uint4*>(in), static_cast<uint4*>(out)));
}
SIMT_EXPORT const char* run_lateness(const void* in, void* out) { return one_warp(lateness, in, 1024, out, 768); }
SIMT_EXPORT const char* run_ldmatrix(const void* in, void* out, int transposed) {
  return one_warp(transposed ? ldmatrix<true> : ldmatrix<false>, in, 512, out, 512);
}

SIMT_EXPORT const char* run_mma(const uint32_t* a, const uint32_t* b, float* c, int f16, int meeting) {
  using Kernel = void (*)(const uint32_t*, const uint32_t*, float*);
  constexpr Kernel kernels[3] = {mma<__nv_bfloat16, Meeting::together>, mma<__nv_bfloat16, Meeting::half_absent>,
                                 mma<__nv_bfloat16, Meeting::two_places>};
  simt::clear_buffers();
  simt::add_buffer(a, 512, "a");
  simt::add_buffer(b, 256, "b");
  simt::add_buffer(c, 512, "c", simt::INOUT);
  return outcome(simt::launch(f16 ? mma<__half, Meeting::together> : kernels[meeting], 1, 32, 0, a, b, c));
}

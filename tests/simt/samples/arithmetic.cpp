// CUDA's arithmetic on arrays, one thread a number; test_simt.py compares it with independent definitions.
#include "probe.h"

template <class T, class F>
__global__ void map(const T* a, const T* b, const T* c, T* out, int n, F f) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = f(a[i], b[i], c[i]);
}
template <class T, class F>
const char* run_map(const T* a, const T* b, const T* c, T* out, int n, F f) {
  const size_t bytes = sizeof(T) * n;
  return probe({{a, bytes, "a", IN}, {b, bytes, "b", IN}, {c, bytes, "c", IN}, {out, bytes, "out", OUT}}, map<T, F>,
               (n + 255) / 256, 256, 0, a, b, c, out, n, f);
}
template <class T>
const char* half_arithmetic(int op, const T* a, const T* b, const T* c, T* out, int n) {
  switch (op) {
    case 0:
      return run_map(a, b, c, out, n, [](T x, T y, T) { return __hadd(x, y); });
    case 1:
      return run_map(a, b, c, out, n, [](T x, T y, T) { return __hsub(x, y); });
    case 2:
      return run_map(a, b, c, out, n, [](T x, T y, T) { return __hmul(x, y); });
    case 3:
      return run_map(a, b, c, out, n, [](T x, T y, T) { return __hdiv(x, y); });
    case 4:
      return run_map(a, b, c, out, n, [](T x, T y, T z) { return __hfma(x, y, z); });
    case 5:
      return run_map(a, b, c, out, n, [](T x, T y, T) { return __hmax(x, y); });
    case 6:
      return run_map(a, b, c, out, n, [](T x, T y, T) { return __hmin(x, y); });
  }
  return "no such operation";
}
SIMT_EXPORT const char* run_half(int op, const __half* a, const __half* b, const __half* c, __half* out, int n) {
  return half_arithmetic(op, a, b, c, out, n);
}
SIMT_EXPORT const char* run_bfloat16(int op, const __nv_bfloat16* a, const __nv_bfloat16* b, const __nv_bfloat16* c,
                                     __nv_bfloat16* out, int n) {
  return half_arithmetic(op, a, b, c, out, n);
}
template <class T2>
const char* pair_arithmetic(int op, const T2* a, const T2* b, const T2* c, T2* out, int n) {
  switch (op) {
    case 0:
      return run_map(a, b, c, out, n, [](T2 x, T2 y, T2) { return __hadd2(x, y); });
    case 1:
      return run_map(a, b, c, out, n, [](T2 x, T2 y, T2) { return __hsub2(x, y); });
    case 2:
      return run_map(a, b, c, out, n, [](T2 x, T2 y, T2) { return __hmul2(x, y); });
    case 3:
      return run_map(a, b, c, out, n, [](T2 x, T2 y, T2) { return __h2div(x, y); });
    case 4:
      return run_map(a, b, c, out, n, [](T2 x, T2 y, T2 z) { return __hfma2(x, y, z); });
    case 5:
      return run_map(a, b, c, out, n, [](T2 x, T2 y, T2) { return __hmax2(x, y); });
    case 6:
      return run_map(a, b, c, out, n, [](T2 x, T2 y, T2) { return __hmin2(x, y); });
    case 7:
      return run_map(a, b, c, out, n, [](T2 x, T2 y, T2) { return x + T2(y.x, y.y); });
    case 8:
      return run_map(a, b, c, out, n, [](T2 x, T2 y, T2) { return x - T2(y.x, y.y); });
    case 9:
      return run_map(a, b, c, out, n, [](T2 x, T2 y, T2) { return x * T2(y.x, y.y); });
    case 10:
      return run_map(a, b, c, out, n, [](T2 x, T2 y, T2) { return x / T2(y.x, y.y); });
  }
  return "no such operation";
}
SIMT_EXPORT const char* run_half2(int op, const __half2* a, const __half2* b, const __half2* c, __half2* out, int n) {
  return pair_arithmetic(op, a, b, c, out, n);
}
SIMT_EXPORT const char* run_bfloat162(int op, const __nv_bfloat162* a, const __nv_bfloat162* b, const __nv_bfloat162* c,
                                      __nv_bfloat162* out, int n) {
  return pair_arithmetic(op, a, b, c, out, n);
}

__global__ void widen(const uint16_t* bits, float* half, float* bfloat) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  half[i] = __half2float(__ushort_as_half(bits[i]));
  bfloat[i] = __bfloat162float(__ushort_as_bfloat16(bits[i]));
}
SIMT_EXPORT const char* run_widen(const uint16_t* bits, float* half, float* bfloat) {
  return probe({{bits, 131072, "bits", IN}, {half, 262144, "half", OUT}, {bfloat, 262144, "bfloat", OUT}}, widen, 64,
               1024, 0, bits, half, bfloat);
}
__global__ void narrow(const float* in, __half* half, __nv_bfloat16* bfloat, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  half[i] = __float2half_rn(in[i]);
  bfloat[i] = __float2bfloat16_rn(in[i]);
}
SIMT_EXPORT const char* run_narrow(const float* in, __half* half, __nv_bfloat16* bfloat, int n) {
  const size_t bytes = 2u * n;
  return probe({{in, 2 * bytes, "in", IN}, {half, bytes, "half", OUT}, {bfloat, bytes, "bfloat", OUT}}, narrow,
               (n + 255) / 256, 256, 0, in, half, bfloat, n);
}

__global__ void bit_operations(const uint32_t* a, const uint32_t* b, const uint32_t* c, uint32_t* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;  // out [10, n]
  if (i >= n) return;
  const uint32_t results[10] = {
      __byte_perm(a[i], b[i], c[i]),
      static_cast<uint32_t>(__popc(a[i])),
      static_cast<uint32_t>(__clz(static_cast<int>(a[i]))),
      static_cast<uint32_t>(__ffs(static_cast<int>(a[i]))),
      __brev(a[i]),
      __funnelshift_l(a[i], b[i], c[i]),
      __funnelshift_r(a[i], b[i], c[i]),
      __umulhi(a[i], b[i]),
      static_cast<uint32_t>(__mulhi(static_cast<int>(a[i]), static_cast<int>(b[i]))),
      __float_as_uint(__uint_as_float(a[i])),
  };
  for (int k = 0; k < 10; k++) out[k * n + i] = results[k];
}
SIMT_EXPORT const char* run_bit_operations(const uint32_t* a, const uint32_t* b, const uint32_t* c, uint32_t* out,
                                           int n) {
  const size_t bytes = 4u * n;
  return probe({{a, bytes, "a", IN}, {b, bytes, "b", IN}, {c, bytes, "c", IN}, {out, 10 * bytes, "out", OUT}},
               bit_operations, (n + 255) / 256, 256, 0, a, b, c, out, n);
}

__global__ void rounding(const float* in, int* out, unsigned* unsigned_out, int n) {  // [4, n]: rn, rz, rd, ru
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const int signed_results[4] = {__float2int_rn(in[i]), __float2int_rz(in[i]), __float2int_rd(in[i]),
                                 __float2int_ru(in[i])};
  const unsigned results[4] = {__float2uint_rn(in[i]), __float2uint_rz(in[i]), __float2uint_rd(in[i]),
                               __float2uint_ru(in[i])};
  for (int k = 0; k < 4; k++) {
    out[k * n + i] = signed_results[k];
    unsigned_out[k * n + i] = results[k];
  }
}
SIMT_EXPORT const char* run_rounding(const float* in, int* out, unsigned* unsigned_out, int n) {
  const size_t bytes = 4u * n;
  return probe({{in, bytes, "in", IN}, {out, 4 * bytes, "out", OUT}, {unsigned_out, 4 * bytes, "unsigned_out", OUT}},
               rounding, (n + 255) / 256, 256, 0, in, out, unsigned_out, n);
}
SIMT_EXPORT const char* run_float(int op, const float* a, const float* b, const float* c, float* out, int n) {
  switch (op) {
    case 0:
      return run_map(a, b, c, out, n, [](float x, float y, float) { return __fadd_rn(x, y); });
    case 1:
      return run_map(a, b, c, out, n, [](float x, float y, float) { return __fsub_rn(x, y); });
    case 2:
      return run_map(a, b, c, out, n, [](float x, float y, float) { return __fmul_rn(x, y); });
    case 3:
      return run_map(a, b, c, out, n, [](float x, float y, float) { return __fdiv_rn(x, y); });
    case 4:
      return run_map(a, b, c, out, n, [](float x, float y, float z) { return __fmaf_rn(x, y, z); });
    case 5:
      return run_map(a, b, c, out, n, [](float x, float, float) { return __frcp_rn(x); });
    case 6:
      return run_map(a, b, c, out, n, [](float x, float, float) { return rintf(x); });
    case 7:
      return run_map(a, b, c, out, n, [](float x, float y, float) { return min(x, y) + max(x, y); });
    case 8:
      return run_map(a, b, c, out, n, [](float x, float y, float z) { return x * y + z; });  // never fused here
  }
  return "no such operation";
}

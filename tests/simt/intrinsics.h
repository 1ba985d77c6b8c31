// Loads with cache hints, bit operations, rounding and approximate arithmetic of one thread.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "float16.h"
#include "qualifiers.h"
#include "runtime.h"

// ---- memory: hints change nothing here; the accesses are the kernel's own

#define SIMT_LOAD(name)                \
  template <class T>                   \
  __forceinline__ T name(const T* p) { \
    return *p;                         \
  }
#define SIMT_STORE(name)                     \
  template <class T>                         \
  __forceinline__ void name(T* p, T value) { \
    *p = value;                              \
  }
SIMT_LOAD(__ldg)
SIMT_LOAD(__ldca)
SIMT_LOAD(__ldcg)
SIMT_LOAD(__ldcs)
SIMT_LOAD(__ldcv)
SIMT_LOAD(__ldlu)
SIMT_STORE(__stcg)
SIMT_STORE(__stcs)
SIMT_STORE(__stwb)
SIMT_STORE(__stwt)
#undef SIMT_LOAD
#undef SIMT_STORE

inline size_t __cvta_generic_to_shared(const void* p) { return simt::smem_u32(p); }
inline void __threadfence() { simt::fence(simt::DEVICE); }
inline void __threadfence_system() { simt::fence(simt::DEVICE); }
inline void __threadfence_block() { simt::fence(simt::BLOCK); }
inline void __nanosleep(unsigned) { simt::yield(); }

// ---- control

[[noreturn]] inline void __trap() { simt::fail("__trap()"); }
#define __builtin_assume(condition) \
  ((condition) ? (void)0 : simt::fail("%s:%d: __builtin_assume(%s) does not hold", __FILE__, __LINE__, #condition))

// ---- bits. SIMT_NOSAN keeps loops out of line, where kernels that use them often would take long to compile.

// nvcc masks the selector with 0x7777: unlike the instruction PRMT, this replicates no signs.
SIMT_NOSAN inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; i++) result |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return result;
}
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(x) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
SIMT_NOSAN inline uint32_t __brev(uint32_t x) {
  uint32_t r = 0;
  for (int i = 0; i < 32; i++) r |= (x >> i & 1) << (31 - i);
  return r;
}
inline uint32_t __funnelshift_l(uint32_t lo, uint32_t hi, uint32_t shift) {
  return static_cast<uint32_t>((static_cast<uint64_t>(hi) << 32 | lo) << (shift & 31) >> 32);
}
inline uint32_t __funnelshift_r(uint32_t lo, uint32_t hi, uint32_t shift) {
  return static_cast<uint32_t>((static_cast<uint64_t>(hi) << 32 | lo) >> (shift & 31));
}
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32); }
inline int __mulhi(int a, int b) { return static_cast<int>(static_cast<int64_t>(a) * b >> 32); }
inline int __mul24(int a, int b) { return (a << 8 >> 8) * (b << 8 >> 8); }

inline float __uint_as_float(uint32_t u) { return simt::real(u); }
inline uint32_t __float_as_uint(float f) { return simt::bits(f); }
inline float __int_as_float(int u) { return simt::real(static_cast<uint32_t>(u)); }
inline int __float_as_int(float f) { return static_cast<int>(simt::bits(f)); }

// ---- arithmetic. The _rn forms are what kernels write to keep nvcc from fusing; here nothing is ever fused.

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1 / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __frsqrt_rn(float a) { return static_cast<float>(1 / sqrt(static_cast<double>(a))); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __saturatef(float a) { return a > 0 ? (a < 1 ? a : 1) : 0; }

// Conversions saturate; NaN becomes 0.
namespace simt {
template <class Integer>
SIMT_NOSAN Integer saturated(double rounded) {
  if (rounded != rounded) return 0;
  using Limits = std::numeric_limits<Integer>;
  if (rounded <= static_cast<double>(Limits::min())) return Limits::min();
  if (rounded >= static_cast<double>(Limits::max())) return Limits::max();
  return static_cast<Integer>(rounded);
}
}  // namespace simt
#define SIMT_ROUND(suffix, function)                                                     \
  inline int __float2int_##suffix(float a) { return simt::saturated<int>(function(a)); } \
  inline unsigned __float2uint_##suffix(float a) { return simt::saturated<unsigned>(function(a)); }
SIMT_ROUND(rn, rintf)
SIMT_ROUND(rz, truncf)
SIMT_ROUND(rd, floorf)
SIMT_ROUND(ru, ceilf)
#undef SIMT_ROUND
inline float __int2float_rn(int a) { return static_cast<float>(a); }
inline float __uint2float_rn(unsigned a) { return static_cast<float>(a); }
inline float __double2float_rn(double a) { return static_cast<float>(a); }

// The hardware's approximations, here to full precision: compare with a tolerance.
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float a) { return expf(a); }
inline float __exp10f(float a) { return powf(10, a); }
inline float __logf(float a) { return logf(a); }
inline float __log2f(float a) { return log2f(a); }
inline float __powf(float a, float b) { return powf(a, b); }
inline float __sinf(float a) { return sinf(a); }
inline float __cosf(float a) { return cosf(a); }
inline float rsqrtf(float a) { return 1 / sqrtf(a); }

template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}

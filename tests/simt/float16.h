// __nv_bfloat16, __half and their pairs, with the arithmetic kernels use: every operation rounds once, as the
// hardware's does. NaN results have CUDA's one pattern, 0x7fff.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "runtime.h"
#include "vector_types.h"

namespace simt {

SIMT_NOSAN inline uint32_t bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}
SIMT_NOSAN inline float real(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}

SIMT_NOSAN inline uint16_t to_bf16(float f) {
  const uint32_t u = bits(f);
  return f != f ? 0x7fff : static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
SIMT_NOSAN inline float from_bf16(uint16_t h) { return real(static_cast<uint32_t>(h) << 16); }

SIMT_NOSAN inline uint16_t to_f16(float f) {
  const _Float16 x = static_cast<_Float16>(f);
  uint16_t h;
  memcpy(&h, &x, 2);
  return f != f ? 0x7fff : h;
}
SIMT_NOSAN inline float from_f16(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00) return real(sign | 0x7f800000 | magnitude << 13);  // infinity, NaN
  return real(sign | bits(real(magnitude << 13) * 0x1p112f));  // rebiases the exponent; exact, subnormals included
}

// a * b + c for 16-bit a, b, c, as a float that rounds to the right 16-bit number: inexact sums are made odd, so that
// no second rounding meets a tie that is none.
SIMT_NOSAN inline float fused(float a, float b, float c) {
  const double product = static_cast<double>(a) * b, sum = product + c;
  const double back = sum - product, lost = (product - (sum - back)) + (c - back);  // TwoSum: sum + lost is exact
  auto odd = [](double value, double residue) {
    uint64_t u;
    memcpy(&u, &value, 8);
    if (residue != 0 && std::isfinite(value) && !(u & 1)) u += (residue > 0) == (value > 0) ? 1 : -1;
    memcpy(&value, &u, 8);
    return value;
  };
  const double exact = odd(sum, lost);
  const float near = static_cast<float>(exact);
  if (!std::isfinite(near) || near == exact || bits(near) & 1) return near;
  return std::nextafter(near, exact > near ? HUGE_VALF : -HUGE_VALF);
}

struct Bfloat16Code {
  SIMT_NOSAN static uint16_t encode(float f) { return to_bf16(f); }
  SIMT_NOSAN static float decode(uint16_t h) { return from_bf16(h); }
};
struct HalfCode {
  SIMT_NOSAN static uint16_t encode(float f) { return to_f16(f); }
  SIMT_NOSAN static float decode(uint16_t h) { return from_f16(h); }
};

// Sums, products and quotients round to float first: with 24 bits >= 2 * 11 + 2, rounding again changes nothing.
template <class Code>
struct alignas(2) Float16 {
  uint16_t v;

  Float16() = default;
  Float16(float f) : v(Code::encode(f)) {}
  operator float() const { return Code::decode(v); }

  static Float16 of_bits(uint16_t bits) {
    Float16 h;
    h.v = bits;
    return h;
  }
  friend Float16 operator+(Float16 a, Float16 b) { return float(a) + float(b); }
  friend Float16 operator-(Float16 a, Float16 b) { return float(a) - float(b); }
  friend Float16 operator*(Float16 a, Float16 b) { return float(a) * float(b); }
  friend Float16 operator/(Float16 a, Float16 b) { return float(a) / float(b); }
  friend Float16 operator-(Float16 a) { return of_bits(a.v ^ 0x8000); }
  friend bool operator==(Float16 a, Float16 b) { return float(a) == float(b); }
  friend bool operator!=(Float16 a, Float16 b) { return float(a) != float(b); }
  friend bool operator<(Float16 a, Float16 b) { return float(a) < float(b); }
  friend bool operator<=(Float16 a, Float16 b) { return float(a) <= float(b); }
  friend bool operator>(Float16 a, Float16 b) { return float(a) > float(b); }
  friend bool operator>=(Float16 a, Float16 b) { return float(a) >= float(b); }
  Float16& operator+=(Float16 b) { return *this = *this + b; }
  Float16& operator-=(Float16 b) { return *this = *this - b; }
  Float16& operator*=(Float16 b) { return *this = *this * b; }
};

template <class Code>
struct alignas(4) Float16x2 {
  Float16<Code> x, y;

  Float16x2() = default;
  Float16x2(Float16<Code> x, Float16<Code> y) : x(x), y(y) {}

  friend Float16x2 operator+(Float16x2 a, Float16x2 b) { return {a.x + b.x, a.y + b.y}; }
  friend Float16x2 operator-(Float16x2 a, Float16x2 b) { return {a.x - b.x, a.y - b.y}; }
  friend Float16x2 operator*(Float16x2 a, Float16x2 b) { return {a.x * b.x, a.y * b.y}; }
  friend Float16x2 operator/(Float16x2 a, Float16x2 b) { return {a.x / b.x, a.y / b.y}; }
};

}  // namespace simt

using __nv_bfloat16 = simt::Float16<simt::Bfloat16Code>;
using __nv_bfloat162 = simt::Float16x2<simt::Bfloat16Code>;
using __half = simt::Float16<simt::HalfCode>;
using __half2 = simt::Float16x2<simt::HalfCode>;
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;
using half = __half;
using half2 = __half2;

// ---- arithmetic: one text for both types, on one number and on pairs

#define SIMT_UNARY(name, expression)                        \
  template <class C>                                        \
  inline simt::Float16<C> name(simt::Float16<C> a) {        \
    return expression;                                      \
  }                                                         \
  template <class C>                                        \
  inline simt::Float16x2<C> name##2(simt::Float16x2<C> a) { \
    return {name(a.x), name(a.y)};                          \
  }
#define SIMT_BINARY(name, expression)                                             \
  template <class C>                                                              \
  inline simt::Float16<C> name(simt::Float16<C> a, simt::Float16<C> b) {          \
    return expression;                                                            \
  }                                                                               \
  template <class C>                                                              \
  inline simt::Float16x2<C> name##2(simt::Float16x2<C> a, simt::Float16x2<C> b) { \
    return {name(a.x, b.x), name(a.y, b.y)};                                      \
  }
#define SIMT_COMPARE(name, operation)                        \
  template <class C>                                         \
  inline bool name(simt::Float16<C> a, simt::Float16<C> b) { \
    return a operation b;                                    \
  }
SIMT_UNARY(__hneg, -a)
SIMT_UNARY(__habs, simt::Float16<C>::of_bits(a.v & 0x7fff))
SIMT_BINARY(__hadd, a + b)
SIMT_BINARY(__hsub, a - b)
SIMT_BINARY(__hmul, a* b)
SIMT_BINARY(__hmax, a != a ? b : b != b ? a : a > b ? a : b)  // as the hardware: a number wins over a NaN
SIMT_BINARY(__hmin, a != a ? b : b != b ? a : a < b ? a : b)
SIMT_COMPARE(__heq, ==)
SIMT_COMPARE(__hne, !=)
SIMT_COMPARE(__hlt, <)
SIMT_COMPARE(__hle, <=)
SIMT_COMPARE(__hgt, >)
SIMT_COMPARE(__hge, >=)
#undef SIMT_UNARY
#undef SIMT_BINARY
#undef SIMT_COMPARE

template <class C>
inline bool __hisnan(simt::Float16<C> a) {
  return a != a;
}
template <class C>
inline simt::Float16<C> __hdiv(simt::Float16<C> a, simt::Float16<C> b) {
  return a / b;
}
template <class C>
inline simt::Float16x2<C> __h2div(simt::Float16x2<C> a, simt::Float16x2<C> b) {
  return a / b;
}
template <class C>
inline simt::Float16<C> __hfma(simt::Float16<C> a, simt::Float16<C> b, simt::Float16<C> c) {
  return simt::fused(a, b, c);
}
template <class C>
inline simt::Float16x2<C> __hfma2(simt::Float16x2<C> a, simt::Float16x2<C> b, simt::Float16x2<C> c) {
  return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};
}
template <class C>
inline float __low2float(simt::Float16x2<C> a) {
  return a.x;
}
template <class C>
inline float __high2float(simt::Float16x2<C> a) {
  return a.y;
}

// ---- conversions, whose names carry the type. `full` as in __float2bfloat16, `pair` as in __bfloat1622float2.

#define SIMT_CONVERSIONS(T, full)                                         \
  inline T __float2##full(float a) { return a; }                          \
  inline T __float2##full##_rn(float a) { return a; }                     \
  inline float __##full##2float(T a) { return a; }                        \
  inline T##2 __float2##full##2_rn(float a) { return {a, a}; }            \
  inline T##2 __floats2##full##2_rn(float a, float b) { return {a, b}; }  \
  inline T##2 __float22##full##2_rn(float2 a) { return {a.x, a.y}; }      \
  inline float2 __##full##22float2(T##2 a) { return {a.x, a.y}; }         \
  inline T##2 __##full##2##full##2(T a) { return {a, a}; }                \
  inline T __ushort_as_##full(unsigned short a) { return T::of_bits(a); } \
  inline unsigned short __##full##_as_ushort(T a) { return a.v; }         \
  inline T __int2##full##_rn(int a) { return static_cast<float>(a); }
SIMT_CONVERSIONS(__nv_bfloat16, bfloat16)
SIMT_CONVERSIONS(__half, half)
#undef SIMT_CONVERSIONS

inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 a, __nv_bfloat16 b) { return {a, b}; }
inline __half2 __halves2half2(__half a, __half b) { return {a, b}; }
inline __nv_bfloat162 make_bfloat162(__nv_bfloat16 a, __nv_bfloat16 b) { return {a, b}; }
inline __half2 make_half2(__half a, __half b) { return {a, b}; }
inline __nv_bfloat16 __low2bfloat16(__nv_bfloat162 a) { return a.x; }
inline __nv_bfloat16 __high2bfloat16(__nv_bfloat162 a) { return a.y; }
inline __half __low2half(__half2 a) { return a.x; }
inline __half __high2half(__half2 a) { return a.y; }

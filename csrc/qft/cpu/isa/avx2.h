// The vector words of the kernels with AVX2, FMA and F16C: two registers hold the 16 lanes.
#pragma once

#include <immintrin.h>

#include "qft/cpu/numbers.h"
#include "qft/decode.h"

namespace qft::avx2 {

struct Vec {
  __m256 low, high;
};
struct Codes {
  __m256i low, high;
};

static inline Vec zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
static inline Vec broadcast(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
static inline Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline void store(float* p, Vec a) {
  _mm256_storeu_ps(p, a.low);
  _mm256_storeu_ps(p + 8, a.high);
}
static inline Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
static inline Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
static inline Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
static inline Vec fma(Vec a, Vec b, Vec c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
static inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(b.low, a.low), _mm256_min_ps(b.high, a.high)}; }
static inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(b.low, a.low), _mm256_max_ps(b.high, a.high)}; }
static inline Vec round(Vec a) {
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.low, nearest), _mm256_round_ps(a.high, nearest)};
}
static inline float sum(Vec a) {  // 16 -> 8 -> 4 -> 2 -> 1 lanes, upper half onto lower
  const __m256 eight = _mm256_add_ps(a.low, a.high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
static inline bool any_not_finite(Vec a) {
  const __m256i exponent = _mm256_set1_epi32(0x7f800000);
  const auto full = [&](__m256 v) { return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_castps_si256(v), exponent), exponent); };
  const __m256i bad = _mm256_or_si256(full(a.low), full(a.high));
  return !_mm256_testz_si256(bad, bad);
}

static inline Codes load_bytes(const uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
}
static inline Codes shift_right(Codes a, int n) { return {_mm256_srli_epi32(a.low, n), _mm256_srli_epi32(a.high, n)}; }
static inline Vec to_float(Codes a) { return {_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)}; }
static inline void store_bytes(uint8_t* p, Codes a) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.low, a.high), 0xd8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
static inline Codes to_codes(Vec a) { return {_mm256_cvttps_epi32(a.low), _mm256_cvttps_epi32(a.high)}; }

// vpermps reads the low three bits of an index: 8 levels are one register, 16 are two chosen between by the fourth bit.
template <int bits>
struct Table {
  __m256 below, above;
  explicit Table(const float* levels) {
    float repeated[16];
    for (int l = 0; l < 16; l++) repeated[l] = levels[l & ((1 << bits) - 1)];
    below = _mm256_loadu_ps(repeated);
    above = _mm256_loadu_ps(repeated + 8);
  }
  Vec operator[](Codes code) const { return {look_up(code.low), look_up(code.high)}; }

 private:
  __m256 look_up(__m256i code) const {
    const __m256 lower = _mm256_permutevar8x32_ps(below, code);
    if constexpr (bits < 4) return lower;
    return _mm256_blendv_ps(lower, _mm256_permutevar8x32_ps(above, code), _mm256_castsi256_ps(_mm256_slli_epi32(code, 28)));
  }
};

template <int repeat>
static inline Vec load_repeated(const float* p) {
  if constexpr (repeat == 16) return broadcast(*p);
  if constexpr (repeat == 8) return {_mm256_set1_ps(p[0]), _mm256_set1_ps(p[1])};
  return {_mm256_set_m128(_mm_set1_ps(p[1]), _mm_set1_ps(p[0])), _mm256_set_m128(_mm_set1_ps(p[3]), _mm_set1_ps(p[2]))};
}

static inline Codes rank(Vec a, const float* midpoints) {
  Codes r = {_mm256_setzero_si256(), _mm256_setzero_si256()};
  for (int i = 0; i < 15; i++) {  // a comparison that holds is -1
    const __m256 mid = _mm256_set1_ps(midpoints[i]);
    r.low = _mm256_sub_epi32(r.low, _mm256_castps_si256(_mm256_cmp_ps(a.low, mid, _CMP_GT_OQ)));
    r.high = _mm256_sub_epi32(r.high, _mm256_castps_si256(_mm256_cmp_ps(a.high, mid, _CMP_GT_OQ)));
  }
  return r;
}

static inline __m256 widen_bf16(__m128i half) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16)); }
static inline __m256i narrow_bf16(__m256 a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
  return _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)));
}
static inline Vec load_bf16(const uint16_t* p) {
  return {widen_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          widen_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
static inline Vec load_f16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
static inline void store_bf16(uint16_t* p, Vec a) {
  const __m256i halves = _mm256_packus_epi32(narrow_bf16(a.low), narrow_bf16(a.high));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(halves, 0xd8));
}
static inline void store_f16(uint16_t* p, Vec a) {
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.low, nearest));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(a.high, nearest));
}

// a0 b0 a1 b1 ... of the lower and of the upper lanes
static inline void interleave(Vec a, Vec b, Vec* low, Vec* high) {
  const auto halves = [](__m256 x, __m256 y, __m256* first, __m256* second) {
    const __m256 even = _mm256_unpacklo_ps(x, y), odd = _mm256_unpackhi_ps(x, y);
    *first = _mm256_permute2f128_ps(even, odd, 0x20);
    *second = _mm256_permute2f128_ps(even, odd, 0x31);
  };
  halves(a.low, b.low, &low->low, &low->high);
  halves(a.high, b.high, &high->low, &high->high);
}

template <int bits>
static inline void store_in_order(float* p, const Vec* v) {
  if constexpr (bits == 8) {
    for (int i = 0; i < 8; i++) store(p + 16 * i, v[i]);
  } else if constexpr (bits == 4) {
    for (int i = 0; i < 4; i++) {
      Vec low, high;
      interleave(v[2 * i], v[2 * i + 1], &low, &high);
      store(p + 32 * i, low);
      store(p + 32 * i + 16, high);
    }
  } else if constexpr (bits == 2) {
    for (int i = 0; i < 2; i++) {
      Vec ac[2], bd[2];
      interleave(v[4 * i], v[4 * i + 2], &ac[0], &ac[1]);
      interleave(v[4 * i + 1], v[4 * i + 3], &bd[0], &bd[1]);
      for (int j = 0; j < 2; j++) {
        Vec low, high;
        interleave(ac[j], bd[j], &low, &high);
        store(p + 64 * i + 32 * j, low);
        store(p + 64 * i + 32 * j + 16, high);
      }
    }
  } else if constexpr (bits == 3) {
    for (int octet = 0; octet < 4; octet++) {  // 8 neighbours of each of the four 32s
      Vec low, high;
      interleave(v[2 * octet], v[2 * octet + 1], &low, &high);
      _mm256_storeu_ps(p + 8 * octet, low.low);
      _mm256_storeu_ps(p + 32 + 8 * octet, low.high);
      _mm256_storeu_ps(p + 64 + 8 * octet, high.low);
      _mm256_storeu_ps(p + 96 + 8 * octet, high.high);
    }
  } else {
    float lanes[8][16];
    for (int i = 0; i < 8; i++) store(lanes[i], v[i]);
    for (int i = 0; i < 8; i++)
      for (int l = 0; l < 16; l++) p[code_at(bits, i, l)] = lanes[i][l];
  }
}

template <int bits>
static inline void load_permuted(const float* p, Vec* v) {
  for (int i = 0; i < 8; i++) {
    float lanes[16];
    for (int l = 0; l < 16; l++) lanes[l] = p[code_at(bits, i, l)];
    v[i] = load(lanes);
  }
}

static inline void unpack3(const uint8_t* p, Codes* octet) {
  uint32_t words[4][4];  // [word of the record][which record]
  for (int sub = 0; sub < 4; sub++)
    for (int i = 0; i < 3; i++) std::memcpy(&words[i][sub], p + 12 * sub + 4 * i, 4);
  for (int sub = 0; sub < 4; sub++)
    words[3][sub] = (words[0][sub] >> 3 & 0x11111111u) | (words[1][sub] >> 2 & 0x22222222u) | (words[2][sub] >> 1 & 0x44444444u);
  for (int i = 0; i < 4; i++) octet[i] = load_bytes(reinterpret_cast<const uint8_t*>(words[i]));
}

}  // namespace qft::avx2

// The vector words of the kernels with AVX-512 (F, BW, DQ, VL): one register holds the 16 lanes.
#pragma once

#include <immintrin.h>

#include "qft/cpu/numbers.h"
#include "qft/decode.h"

namespace qft::avx512 {

using Vec = __m512;
using Codes = __m512i;

static inline Vec zero() { return _mm512_setzero_ps(); }
static inline Vec broadcast(float a) { return _mm512_set1_ps(a); }
static inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
static inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a); }
static inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
static inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
static inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
static inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
static inline Vec min(Vec a, Vec b) { return _mm512_min_ps(b, a); }
static inline Vec max(Vec a, Vec b) { return _mm512_max_ps(b, a); }
static inline Vec round(Vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline float sum(Vec a) {  // 16 -> 8 -> 4 -> 2 -> 1 lanes, upper half onto lower
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
static inline bool any_not_finite(Vec a) {
  return _mm512_fpclass_ps_mask(a, 0x01 | 0x08 | 0x10 | 0x80) != 0;  // quiet NaN, +inf, -inf, signalling NaN
}

static inline Codes load_bytes(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
static inline Codes shift_right(Codes a, int n) { return _mm512_srli_epi32(a, static_cast<unsigned>(n)); }
static inline Vec to_float(Codes a) { return _mm512_cvtepi32_ps(a); }
static inline void store_bytes(uint8_t* p, Codes a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a));
}
static inline Codes to_codes(Vec a) { return _mm512_cvttps_epi32(a); }

// vpermps reads the low four bits of an index: a table of fewer levels repeats them, and no code needs masking.
template <int bits>
struct Table {
  Vec entry;
  explicit Table(const float* levels) {
    float repeated[16];
    for (int l = 0; l < 16; l++) repeated[l] = levels[l & ((1 << bits) - 1)];
    entry = load(repeated);
  }
  Vec operator[](Codes code) const { return _mm512_permutexvar_ps(code, entry); }
};

template <int repeat>
static inline Vec load_repeated(const float* p) {
  if constexpr (repeat == 16) return broadcast(*p);
  if constexpr (repeat == 8)
    return _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_set1_ps(p[0])), _mm256_set1_ps(p[1]), 1);
  return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3),
                               _mm512_castps128_ps512(_mm_loadu_ps(p)));
}

// binary search: four comparisons for 15 midpoints
static inline Codes rank(Vec a, const float* midpoints) {
  const Vec mid = load(midpoints);
  Codes r = _mm512_setzero_si512();
  for (int half = 8; half; half /= 2) {
    const Codes probe = _mm512_add_epi32(r, _mm512_set1_epi32(half - 1));
    const __mmask16 above = _mm512_cmp_ps_mask(a, _mm512_permutexvar_ps(probe, mid), _CMP_GT_OQ);
    r = _mm512_mask_add_epi32(r, above, r, _mm512_set1_epi32(half));
  }
  return r;
}

static inline Vec load_bf16(const uint16_t* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
static inline Vec load_f16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
static inline void store_bf16(uint16_t* p, Vec a) {
  const __m512i bits = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
  const __m512i half = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), quiet);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(half));
}
static inline void store_f16(uint16_t* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// a0 b0 a1 b1 ... of the lower and of the upper lanes
static inline void interleave(Vec a, Vec b, Vec* low, Vec* high) {
  const Codes first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const Codes second = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  *low = _mm512_permutex2var_ps(a, first, b);
  *high = _mm512_permutex2var_ps(a, second, b);
}
static inline void split(Vec low, Vec high, Vec* even, Vec* odd) {
  const Codes first = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const Codes second = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  *even = _mm512_permutex2var_ps(low, first, high);
  *odd = _mm512_permutex2var_ps(low, second, high);
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
      _mm256_storeu_ps(p + 8 * octet, _mm512_castps512_ps256(low));
      _mm256_storeu_ps(p + 32 + 8 * octet, _mm512_extractf32x8_ps(low, 1));
      _mm256_storeu_ps(p + 64 + 8 * octet, _mm512_castps512_ps256(high));
      _mm256_storeu_ps(p + 96 + 8 * octet, _mm512_extractf32x8_ps(high, 1));
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
  if constexpr (bits == 8) {
    for (int i = 0; i < 8; i++) v[i] = load(p + 16 * i);
  } else if constexpr (bits == 4) {
    for (int i = 0; i < 4; i++) split(load(p + 32 * i), load(p + 32 * i + 16), &v[2 * i], &v[2 * i + 1]);
  } else {
    for (int i = 0; i < 8; i++) {
      alignas(64) int32_t at[16];
      for (int l = 0; l < 16; l++) at[l] = code_at(bits, i, l);
      v[i] = _mm512_i32gather_ps(_mm512_load_si512(at), p, 4);
    }
  }
}

static inline void unpack3(const uint8_t* p, Codes* octet) {
  const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m256i bc = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16));
  const __m512i words = _mm512_inserti64x4(_mm512_castsi128_si512(a), bc, 1);  // words 0..3 and, from lane 8 on, 4..11
  const __m512i sorted = _mm512_permutexvar_epi32(
      _mm512_setr_epi32(0, 3, 10, 13, 1, 8, 11, 14, 2, 9, 12, 15, 0, 0, 0, 0), words);  // by word of each 12-byte record
  const __m128i first = _mm512_castsi512_si128(sorted), second = _mm512_extracti32x4_epi32(sorted, 1),
                third = _mm512_extracti32x4_epi32(sorted, 2);
  const __m128i plane = _mm_set1_epi32(0x11111111);
  const __m128i fourth = _mm_or_si128(
      _mm_or_si128(_mm_and_si128(_mm_srli_epi32(first, 3), plane), _mm_and_si128(_mm_srli_epi32(second, 2), _mm_slli_epi32(plane, 1))),
      _mm_and_si128(_mm_srli_epi32(third, 1), _mm_slli_epi32(plane, 2)));
  octet[0] = _mm512_cvtepu8_epi32(first);
  octet[1] = _mm512_cvtepu8_epi32(second);
  octet[2] = _mm512_cvtepu8_epi32(third);
  octet[3] = _mm512_cvtepu8_epi32(fourth);
}

}  // namespace qft::avx512

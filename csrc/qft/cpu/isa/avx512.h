// The vector words of the kernels with AVX-512 (F, BW, DQ, VL): one register holds the 16 lanes. Also part of the words
// of instruction sets that know more.
#pragma once

#include <immintrin.h>

#include "qft/cpu/numbers.h"
#include "qft/decode.h"

namespace qft::QFT_ISA {

constexpr int kTileOutputs = 4;  // outputs and rows of x that a matmul tile keeps in the 32 registers
constexpr int kTileRows = 4;
constexpr int kOutputsAtOnce = 4;
constexpr int kCandidates = 8;  // scales that a search tries at a time
constexpr int kUnroll = 8;

using Vec = __m512;
using Codes = __m512i;

static inline Vec zero() { return _mm512_setzero_ps(); }
static inline Vec broadcast(float a) { return _mm512_set1_ps(a); }
static inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
static inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a); }
static inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
static inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
static inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
static inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
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

static inline float lowest(Vec a) { return _mm512_reduce_min_ps(a); }
static inline float highest(Vec a) { return _mm512_reduce_max_ps(a); }

static inline Codes load_bytes(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
static inline Codes load_halves(const uint8_t* p) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
static inline Codes load_words(const uint8_t* p) { return _mm512_loadu_si512(p); }
// The fourth word of a record is picked bit by bit from the spare bits of the other three, brought to its lane. What
// lies in its own spare bits stays: lookups of 8 levels do not read them. Two loads, for a masked one is slow and a
// whole one would pass the end; few shifts and shuffles, which share the busiest units with the lookups.
static inline Codes load_records(const uint8_t* p) {
  const Codes front = _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const Codes back = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16)));
  const Codes lanes = _mm512_setr_epi32(0, 1, 2, 0, 3, 16, 17, 3, 18, 19, 20, 18, 21, 22, 23, 21);
  const Codes words = _mm512_permutex2var_epi32(front, lanes, back);  // lane 3 of each four repeats lane 0
  const Codes planes = _mm512_srlv_epi32(words, _mm512_setr_epi32(3, 2, 1, 3, 3, 2, 1, 3, 3, 2, 1, 3, 3, 2, 1, 3));
  const Codes second = _mm512_shuffle_epi32(planes, _MM_PERM_BBBB), third = _mm512_shuffle_epi32(planes, _MM_PERM_CCCC);
  constexpr int select = 0xca;  // a ? b : c, bit by bit
  const Codes later = _mm512_ternarylogic_epi32(_mm512_set1_epi32(0x22222222), second, third, select);
  return _mm512_mask_mov_epi32(words, 0x8888,
                               _mm512_ternarylogic_epi32(_mm512_set1_epi32(0x11111111), planes, later, select));
}
static inline void load_octets(const uint8_t* p, Codes* low, Codes* high) {
  const Codes a = load_words(p), b = load_words(p + 64);
  *low = _mm512_permutex2var_epi32(a, _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30), b);
  *high = _mm512_permutex2var_epi32(a, _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31), b);
}
template <int stride>
static inline Codes in_order(Codes words, int i) {
  const Codes each = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7);
  const Codes word =
      _mm512_add_epi32(_mm512_set1_epi32(2 * i), _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1));
  return _mm512_srlv_epi32(_mm512_permutexvar_epi32(word, words), _mm512_mullo_epi32(each, _mm512_set1_epi32(stride)));
}
static inline Codes shift_right(Codes a, int n) { return _mm512_srli_epi32(a, static_cast<unsigned>(n)); }
static inline Vec to_float(Codes a) { return _mm512_cvtepi32_ps(a); }
static inline Vec low_byte_above_2_23(Codes a) {
  return _mm512_castsi512_ps(
      _mm512_ternarylogic_epi32(a, _mm512_set1_epi32(0xff), _mm512_set1_epi32(0x4b000000), 0xea));
}
static inline Codes to_codes(Vec a) { return _mm512_cvttps_epi32(a); }
static inline void store_bytes(uint8_t* p, Codes a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a));
}
static inline void store_bytes_through(uint8_t* p, Codes a, const uint8_t* table) {
  const __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_shuffle_epi8(entries, _mm512_cvtepi32_epi8(a)));
}
static inline Vec gather(const float* table, const uint8_t* p) { return _mm512_i32gather_ps(load_bytes(p), table, 4); }

// vpermps reads the low four bits of an index: a table of fewer levels repeats them, and no code needs masking. Four
// bits are two or four short codes: the later of them have tables of their own, which saves their shifts.
template <int bits>
struct Table {
  static constexpr int together = 4 / bits;  // codes in four bits
  Vec entry, later[together > 1 ? together - 1 : 1];

  explicit Table(const float* levels) {
    float repeated[16];
    for (int j = 0; j < together; j++) {
      for (int l = 0; l < 16; l++) repeated[l] = levels[l >> (bits * j) & ((1 << bits) - 1)];
      (j ? later[j - 1] : entry) = load(repeated);
    }
  }
  Vec operator[](Codes code) const { return _mm512_permutexvar_ps(code, entry); }

  // code v of each lane's eight, `stride` bits apart
  template <int stride>
  Vec code(Codes words, int v) const {
    const Codes from = shift_right(words, stride * (v / together * together));
    return _mm512_permutexvar_ps(from, v % together ? later[v % together - 1] : entry);
  }

  void set_weights(const Table& levels, Vec scale, Vec zero_point) {
    entry = _mm512_mul_ps(_mm512_sub_ps(levels.entry, zero_point), scale);
  }
};

struct LaneScales {
  Codes from;
  __mmask8 read;
  explicit LaneScales(int count) : read(static_cast<__mmask8>((1 << count) - 1)) {
    alignas(64) int32_t lane[16];
    for (int l = 0; l < 16; l++) lane[l] = l * count / 16;
    from = _mm512_load_si512(lane);
  }
  Vec operator()(const float* p) const {
    return _mm512_permutexvar_ps(from, _mm512_castps128_ps512(_mm_maskz_loadu_ps(read, p)));
  }
};

// binary search: a comparison per bit; each step has a table of its own, in which the rank so far finds its midpoint
template <int bits>
static inline Codes rank(Vec a, const float* midpoints) {
  const Vec mid = load(midpoints);
  Codes r = _mm512_setzero_si512();
  for (int half = 1 << (bits - 1); half; half /= 2) {
    const Codes lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const Vec probes = _mm512_permutexvar_ps(_mm512_add_epi32(lanes, _mm512_set1_epi32(half - 1)), mid);
    const __mmask16 above = _mm512_cmp_ps_mask(a, _mm512_permutexvar_ps(r, probes), _CMP_GT_OQ);
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
static inline __m256i narrow_bf16(Vec a) {
  const __m512i bits = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
  const __m512i half = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), quiet);
  return _mm512_cvtepi32_epi16(half);
}
static inline __m256i narrow_f16(Vec a) { return _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline void store_bf16(uint16_t* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(a));
}
static inline void store_f16(uint16_t* p, Vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_f16(a)); }

// Weights of 16 bits, 32 a register: a table of them is looked up by vpermw, which reads the low five bits of an index.
constexpr bool kHalfTables = true;

template <int bits>
struct HalfTable {
  __m512i entry;
  void set(const Table<bits>& weights, bool bf16) {
    const __m256i once = bf16 ? narrow_bf16(weights.entry) : narrow_f16(weights.entry);
    entry = _mm512_inserti64x4(_mm512_castsi256_si512(once), once, 1);
  }
  // the weights of codes 32 i + l of words that hold 8 codes each
  template <int stride>
  __m512i in_order(Codes words, int i) const {
    alignas(64) uint16_t half[32], shift[32];
    for (int l = 0; l < 32; l++) {
      const int bit = stride * (l % 8);
      half[l] = static_cast<uint16_t>(2 * (4 * i + l / 8) + bit / 16);
      shift[l] = static_cast<uint16_t>(bit % 16);
    }
    const __m512i codes =
        _mm512_srlv_epi16(_mm512_permutexvar_epi16(_mm512_load_si512(half), words), _mm512_load_si512(shift));
    return _mm512_permutexvar_epi16(codes, entry);
  }
};
static inline void store_halves(uint16_t* p, __m512i a) { _mm512_storeu_si512(p, a); }
// past the caches; other threads see them after finish_streams
static inline void stream_halves(uint16_t* p, __m512i a) { _mm512_stream_si512(reinterpret_cast<__m512i*>(p), a); }
static inline void finish_streams() { _mm_sfence(); }

}  // namespace qft::QFT_ISA

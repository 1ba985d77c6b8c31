// The vector words of the kernels with AVX-512 and its dot products of bf16: a lane holds a pair of numbers, and one
// instruction adds the products of both to the lane's fp32 sum.
#pragma once

#include "qft/cpu/isa/avx512.h"

namespace qft::QFT_ISA {

using Pairs = __m512i;

static inline Pairs no_pairs() { return _mm512_setzero_si512(); }
static inline Pairs load_pairs(const void* p) { return _mm512_loadu_si512(p); }
static inline void store_pairs(void* p, Pairs a) { _mm512_storeu_si512(p, a); }
static inline Pairs broadcast_pair(const uint32_t* p) { return _mm512_set1_epi32(static_cast<int>(*p)); }

static inline Vec dot(Vec sum, Pairs a, Pairs b) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

// 32 numbers rounded to nearest even, `low` first; subnormal ones become 0
static inline __m512i narrow_two(Vec low, Vec high) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}
// lane by lane, `low` in the lower half
static inline Pairs pair_up(Vec low, Vec high) {
  alignas(64) static constexpr uint16_t lanes[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(lanes), narrow_two(low, high));
}
// the lower, or the upper, numbers of two vectors of pairs as pairs
static inline Pairs lower_halves(Pairs a, Pairs b) {
  return _mm512_mask_blend_epi16(0xaaaaaaaa, a, _mm512_slli_epi32(b, 16));
}
static inline Pairs upper_halves(Pairs a, Pairs b) {
  return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(a, 16), b);
}

// 8 short codes a lane, the later four of them from bit 16 on
static inline Codes load_split_bytes(const uint8_t* p) {  // 2 bits each
  return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
static inline Codes load_split_nibbles(const uint8_t* p) {  // 1 bit each
  const Codes bytes = load_bytes(p);
  return _mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 12));
}

// The weights of a block's groups in bf16, 16 a group, looked up by vpermw: an index is a code's four bits and, above
// them, which of the block's groups its lane belongs to.
template <bool four_groups>
struct GroupTable {
  __m512i first, second;  // groups 0 and 1, 2 and 3

  GroupTable() = default;
  template <class Weights>  // of a group, its 16 weights in fp32
  explicit GroupTable(Weights weights) : first(narrow_two(weights(0), weights(1))) {
    if constexpr (four_groups) second = narrow_two(weights(2), weights(3));
  }

  // of the codes that the lowest bits of each half lane hold
  Pairs operator[](Codes words) const {
    constexpr int and_or = 0xea;  // a & b | c
    const __m512i nibble = _mm512_set1_epi16(15);
    if constexpr (four_groups) {
      const __m512i group = _mm512_setr_epi32(0, 0, 0, 0, 0x100010, 0x100010, 0x100010, 0x100010, 0x200020, 0x200020,
                                              0x200020, 0x200020, 0x300030, 0x300030, 0x300030, 0x300030);
      return _mm512_permutex2var_epi16(first, _mm512_ternarylogic_epi32(words, nibble, group, and_or), second);
    }
    const __m512i group = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0x100010, 0x100010, 0x100010, 0x100010, 0x100010,
                                            0x100010, 0x100010, 0x100010);
    return _mm512_permutexvar_epi16(_mm512_ternarylogic_epi32(words, nibble, group, and_or), first);
  }
};

static inline __mmask16 first_of_16(int64_t count) {
  return count >= 16 ? 0xffff : static_cast<__mmask16>((1 << count) - 1);
}
// the first `count` of 16 numbers
static inline void store_bf16_up_to(uint16_t* p, Vec a, int64_t count) {
  _mm256_mask_storeu_epi16(p, first_of_16(count), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a)));
}

// 16 pairs of neighbours: `count` numbers of 16 bits and zeros after them
static inline Pairs load_pairs_up_to(const uint16_t* p, int64_t count) {
  const __mmask32 read = count >= 32 ? ~0u : count <= 0 ? 0 : (1u << count) - 1;
  return _mm512_maskz_loadu_epi16(read, p);
}
// 64 pairs: (8 l + v, 8 l + v + 4) in lane l of vector v
static inline void load_code_pairs(const uint16_t* p, int64_t count, Pairs (&pairs)[4]) {
  alignas(64) uint16_t from[32];
  for (int v = 0; v < 4; v++)
    for (int l = 0; l < 4; l++)
      for (int half = 0; half < 2; half++) from[8 * v + 2 * l + half] = static_cast<uint16_t>(8 * l + v + 4 * half);
  const __m512i order = _mm512_load_si512(from);
  __m512i quarter[4];  // four lanes each of all vectors: 128-bit lane v holds those of vector v
  for (int i = 0; i < 4; i++)
    quarter[i] = _mm512_permutexvar_epi16(order, load_pairs_up_to(p + 32 * i, count - 32 * i));
  const __m512i a = _mm512_shuffle_i32x4(quarter[0], quarter[1], 0x44),
                b = _mm512_shuffle_i32x4(quarter[2], quarter[3], 0x44),
                c = _mm512_shuffle_i32x4(quarter[0], quarter[1], 0xee),
                d = _mm512_shuffle_i32x4(quarter[2], quarter[3], 0xee);
  pairs[0] = _mm512_shuffle_i32x4(a, b, 0x88);
  pairs[1] = _mm512_shuffle_i32x4(a, b, 0xdd);
  pairs[2] = _mm512_shuffle_i32x4(c, d, 0x88);
  pairs[3] = _mm512_shuffle_i32x4(c, d, 0xdd);
}

// lane j of row i to lane i of row j
static inline void transpose(__m512i (&row)[16]) {
  __m512i other[16];
  for (int i = 0; i < 8; i++) {
    other[2 * i] = _mm512_unpacklo_epi32(row[2 * i], row[2 * i + 1]);
    other[2 * i + 1] = _mm512_unpackhi_epi32(row[2 * i], row[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    row[4 * i] = _mm512_unpacklo_epi64(other[4 * i], other[4 * i + 2]);
    row[4 * i + 1] = _mm512_unpackhi_epi64(other[4 * i], other[4 * i + 2]);
    row[4 * i + 2] = _mm512_unpacklo_epi64(other[4 * i + 1], other[4 * i + 3]);
    row[4 * i + 3] = _mm512_unpackhi_epi64(other[4 * i + 1], other[4 * i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    other[i] = _mm512_shuffle_i32x4(row[i], row[4 + i], 0x88);
    other[4 + i] = _mm512_shuffle_i32x4(row[i], row[4 + i], 0xdd);
    other[8 + i] = _mm512_shuffle_i32x4(row[8 + i], row[12 + i], 0x88);
    other[12 + i] = _mm512_shuffle_i32x4(row[8 + i], row[12 + i], 0xdd);
  }
  for (int i = 0; i < 8; i++) {
    row[i] = _mm512_shuffle_i32x4(other[i], other[8 + i], 0x88);
    row[8 + i] = _mm512_shuffle_i32x4(other[i], other[8 + i], 0xdd);
  }
}

}  // namespace qft::QFT_ISA

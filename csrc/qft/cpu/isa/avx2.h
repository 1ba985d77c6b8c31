// The vector words of the kernels with AVX2, FMA and F16C: two registers hold the 16 lanes.
#pragma once

#include <immintrin.h>

#include "qft/cpu/byte_levels.h"
#include "qft/cpu/numbers.h"
#include "qft/decode.h"

namespace qft::avx2 {

constexpr int kTileOutputs = 4;  // outputs and rows of x of a matmul tile
constexpr int kTileRows = 4;
constexpr int kOutputsAtOnce = 1;  // of those outputs: what the 16 registers hold beside a block's levels
constexpr int kCandidates = 2;     // scales that a search tries at a time
constexpr int kUnroll = 8;
constexpr bool kHalfTables = false;  // whether tables of 16-bit weights can be looked up
template <int bits>
struct HalfTable;
void finish_streams();

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
static inline Vec div(Vec a, Vec b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
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
  const auto full = [&](__m256 v) {
    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_castps_si256(v), exponent), exponent);
  };
  const __m256i bad = _mm256_or_si256(full(a.low), full(a.high));
  return !_mm256_testz_si256(bad, bad);
}

static inline float lowest(Vec a) {
  const __m256 eight = _mm256_min_ps(a.low, a.high);
  const __m128 four = _mm_min_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_min_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_min_ss(two, _mm_movehdup_ps(two)));
}
static inline float highest(Vec a) {
  const __m256 eight = _mm256_max_ps(a.low, a.high);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

static inline Codes load_bytes(const uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
}
static inline Codes load_halves(const uint8_t* p) {
  return {_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16)))};
}
static inline Codes load_words(const uint8_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
}
// The fourth word of a record is picked bit by bit from the spare bits of the other three, brought to its lane. Records
// 0 and 1 leave the fourth lane of their half free; 2 and 3, read from four bytes before, the first: so the same few
// shuffles serve all, and no load passes the 48 bytes.
static inline Codes load_records(const uint8_t* p) {
  const auto at = [p](int byte) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + byte)); };
  const auto halves = [](int a, int b, int c, int d) { return _mm256_setr_epi32(a, b, c, d, a, b, c, d); };
  const auto planes = [](__m256i words, __m256i shifts, __m256i bits) {
    return _mm256_and_si256(_mm256_srlv_epi32(words, shifts), bits);
  };
  const __m256i front = _mm256_set_m128i(at(12), at(0)), back = _mm256_set_m128i(at(32), at(20));
  const __m256i a = planes(front, halves(3, 2, 1, 0), halves(0x11111111, 0x22222222, 0x44444444, 0));
  const __m256i b = planes(back, halves(0, 3, 2, 1), halves(0, 0x11111111, 0x22222222, 0x44444444));
  const __m256i pairs = _mm256_or_si256(_mm256_unpacklo_epi32(b, a), _mm256_unpackhi_epi32(b, a));
  const __m256i fourth = _mm256_or_si256(pairs, _mm256_shuffle_epi32(pairs, _MM_SHUFFLE(1, 0, 3, 2)));
  return {_mm256_blend_epi32(front, fourth, 0x88),
          _mm256_shuffle_epi32(_mm256_blend_epi32(back, fourth, 0x11), _MM_SHUFFLE(0, 3, 2, 1))};
}
static inline void load_octets(const uint8_t* p, Codes* low, Codes* high) {
  const auto split = [](__m256i a, __m256i b, __m256i* even, __m256i* odd) {
    const __m256i first = _mm256_permutevar8x32_epi32(a, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
    const __m256i second = _mm256_permutevar8x32_epi32(b, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
    *even = _mm256_permute2x128_si256(first, second, 0x20);
    *odd = _mm256_permute2x128_si256(first, second, 0x31);
  };
  const Codes a = load_words(p), b = load_words(p + 64);
  split(a.low, a.high, &low->low, &high->low);
  split(b.low, b.high, &low->high, &high->high);
}
template <int stride>
static inline Codes in_order(Codes words, int i) {
  const __m256i half = i < 4 ? words.low : words.high;
  const __m256i shifts =
      _mm256_setr_epi32(0, stride, 2 * stride, 3 * stride, 4 * stride, 5 * stride, 6 * stride, 7 * stride);
  return {_mm256_srlv_epi32(_mm256_permutevar8x32_epi32(half, _mm256_set1_epi32(2 * i % 8)), shifts),
          _mm256_srlv_epi32(_mm256_permutevar8x32_epi32(half, _mm256_set1_epi32(2 * i % 8 + 1)), shifts)};
}
static inline Codes shift_right(Codes a, int n) { return {_mm256_srli_epi32(a.low, n), _mm256_srli_epi32(a.high, n)}; }
static inline Vec to_float(Codes a) { return {_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)}; }
static inline Vec low_byte_above_2_23(Codes a) {
  const auto above = [](__m256i v) {
    return _mm256_castsi256_ps(
        _mm256_or_si256(_mm256_and_si256(v, _mm256_set1_epi32(0xff)), _mm256_set1_epi32(0x4b000000)));
  };
  return {above(a.low), above(a.high)};
}
static inline Codes to_codes(Vec a) { return {_mm256_cvttps_epi32(a.low), _mm256_cvttps_epi32(a.high)}; }
static inline __m128i narrow_bytes(Codes a) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.low, a.high), 0xd8);
  return _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}
static inline void store_bytes(uint8_t* p, Codes a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_bytes(a));
}
static inline void store_bytes_through(uint8_t* p, Codes a, const uint8_t* table) {
  const __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_shuffle_epi8(entries, narrow_bytes(a)));
}
static inline Vec gather(const float* table, const uint8_t* p) {
  const Codes at = load_bytes(p);
  return {_mm256_i32gather_ps(table, at.low, 4), _mm256_i32gather_ps(table, at.high, 4)};
}

// vpermilps reads the low two bits of an index, vpermps three: 8 levels are one register, 16 are two chosen between by
// the fourth bit.
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

  // code v of each lane's eight, `stride` bits apart
  template <int stride>
  Vec code(Codes words, int v) const {
    return (*this)[shift_right(words, stride * v)];
  }
  void set_weights(const Table& levels, Vec scale, Vec zero_point) {
    below = _mm256_mul_ps(_mm256_sub_ps(levels.below, zero_point.low), scale.low);
    above = _mm256_mul_ps(_mm256_sub_ps(levels.above, zero_point.low), scale.low);
  }

 private:
  __m256 look_up(__m256i code) const {
    if constexpr (bits < 3) return _mm256_permutevar_ps(below, code);
    const __m256 lower = _mm256_permutevar8x32_ps(below, code);
    if constexpr (bits < 4) return lower;
    return _mm256_blendv_ps(lower, _mm256_permutevar8x32_ps(above, code),
                            _mm256_castsi256_ps(_mm256_slli_epi32(code, 28)));
  }
};

// From bytes, where that takes fewer instructions than lane by lane: codes of 4 bits and more. Of 32 codes at a time,
// vpshufb looks up the first bytes of their levels, the second ones ..., which unpacking puts
// together. Four lanes hold codes of one 32.
template <>
struct ByteLevels<Levels::codebook, 4> {
  static constexpr bool used = true;
  static constexpr float unit = 1;
  static constexpr int column(int v, int l) {
    const int byte = 8 * (v / 4) + 4 * (v % 2) + l % 4, nibble = v / 2 % 2;
    return 32 * (l / 4) + 2 * byte + nibble;
  }
  __m256i table[4];

  ByteLevels(const float* levels, bool) {
    for (int i = 0; i < 4; i++) {
      alignas(16) uint8_t bytes[16];
      for (int c = 0; c < 16; c++) bytes[c] = static_cast<uint8_t>(bits_of(levels[c]) >> (8 * i));
      table[i] = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes)));
    }
  }
  Vec operator()(Codes low, Codes, int v) const {
    const __m256i pairs = v < 4 ? _mm256_unpacklo_epi64(low.low, low.high) : _mm256_unpackhi_epi64(low.low, low.high);
    const __m256i codes = _mm256_and_si256(v % 4 < 2 ? pairs : _mm256_srli_epi32(pairs, 4), _mm256_set1_epi8(15));
    const auto look_up = [&](int i) { return _mm256_shuffle_epi8(table[i], codes); };
    const auto floats = [v](__m256i first, __m256i second) {
      return _mm256_castsi256_ps(v % 2 ? _mm256_unpackhi_epi16(first, second) : _mm256_unpacklo_epi16(first, second));
    };
    return {floats(_mm256_unpacklo_epi8(look_up(0), look_up(1)), _mm256_unpacklo_epi8(look_up(2), look_up(3))),
            floats(_mm256_unpackhi_epi8(look_up(0), look_up(1)), _mm256_unpackhi_epi8(look_up(2), look_up(3)))};
  }
};

// Integers convert. A byte that has a sign goes to the top of its lane, where it is 2^24 levels: activations are scaled
// to match, which takes nothing above 2^-118 from a product. With zero points to subtract none has a sign, and bytes go
// to the bottom.
template <int bits>
struct IntegerBytes {
  static constexpr bool used = true;
  static constexpr int column(int v, int l) { return code_at(v, l); }
  float unit;
  __m256i offset, to_lanes[4];  // to_lanes[i] picks byte i of each lane

  IntegerBytes(const float*, bool zero)
      : unit(zero ? 1 : 0x1p-24f), offset(_mm256_set1_epi8(static_cast<char>(zero ? 0 : 1 << (bits - 1)))) {
    const __m256i first = _mm256_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12);
    for (int i = 0; i < 4; i++) {
      const __m256i byte = _mm256_add_epi32(first, _mm256_set1_epi32(i));
      to_lanes[i] = zero ? _mm256_or_si256(byte, _mm256_set1_epi32(static_cast<int>(0x80808000)))
                         : _mm256_or_si256(_mm256_slli_epi32(byte, 24), _mm256_set1_epi32(0x00808080));
    }
  }
  Vec operator()(Codes low, Codes high, int v) const {
    if constexpr (bits == 8) return levels(v < 4 ? low : high, v % 4);
    const Codes codes = v % 2 ? shift_right(low, 4) : low;
    const __m256i nibble = _mm256_set1_epi8(15);
    return levels({_mm256_and_si256(codes.low, nibble), _mm256_and_si256(codes.high, nibble)}, v / 2);
  }

 private:
  Vec levels(Codes bytes, int i) const {
    return to_float({_mm256_shuffle_epi8(_mm256_sub_epi8(bytes.low, offset), to_lanes[i]),
                     _mm256_shuffle_epi8(_mm256_sub_epi8(bytes.high, offset), to_lanes[i])});
  }
};
template <>
struct ByteLevels<Levels::integer, 4> : IntegerBytes<4> {
  using IntegerBytes::IntegerBytes;
};
template <>
struct ByteLevels<Levels::integer, 8> : IntegerBytes<8> {
  using IntegerBytes::IntegerBytes;
};

struct LaneScales {
  Codes from;
  __m128i read;
  explicit LaneScales(int count) {
    alignas(32) int32_t lane[16], wanted[4];
    for (int l = 0; l < 16; l++) lane[l] = l * count / 16;
    for (int i = 0; i < 4; i++) wanted[i] = i < count ? -1 : 0;
    from = load_words(reinterpret_cast<const uint8_t*>(lane));
    read = _mm_load_si128(reinterpret_cast<const __m128i*>(wanted));
  }
  Vec operator()(const float* p) const {
    const __m256 scales = _mm256_castps128_ps256(_mm_maskload_ps(p, read));
    return {_mm256_permutevar8x32_ps(scales, from.low), _mm256_permutevar8x32_ps(scales, from.high)};
  }
};

template <int bits>
static inline Codes rank(Vec a, const float* midpoints) {
  Codes r = {_mm256_setzero_si256(), _mm256_setzero_si256()};
  for (int i = 0; i < (1 << bits) - 1; i++) {  // a comparison that holds is -1
    const __m256 mid = _mm256_set1_ps(midpoints[i]);
    r.low = _mm256_sub_epi32(r.low, _mm256_castps_si256(_mm256_cmp_ps(a.low, mid, _CMP_GT_OQ)));
    r.high = _mm256_sub_epi32(r.high, _mm256_castps_si256(_mm256_cmp_ps(a.high, mid, _CMP_GT_OQ)));
  }
  return r;
}

static inline __m256 widen_bf16(__m128i half) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
static inline __m256i narrow_bf16(__m256 a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
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

}  // namespace qft::avx2

// The vector words of the kernels in plain C++: 16 lanes, one after the other.
#pragma once

#include <cmath>
#include <cstdint>

#include "qft/cpu/numbers.h"
#include "qft/decode.h"

namespace qft::scalar {

struct Vec {
  float lane[16];
};
struct Codes {
  uint32_t lane[16];
};

#define QFT_LANES for (int l = 0; l < 16; l++)

static inline Vec zero() { return {}; }
static inline Vec broadcast(float a) {
  Vec r;
  QFT_LANES r.lane[l] = a;
  return r;
}
static inline Vec load(const float* p) {
  Vec r;
  QFT_LANES r.lane[l] = p[l];
  return r;
}
static inline void store(float* p, Vec a) { QFT_LANES p[l] = a.lane[l]; }
static inline Vec add(Vec a, Vec b) {
  QFT_LANES a.lane[l] += b.lane[l];
  return a;
}
static inline Vec sub(Vec a, Vec b) {
  QFT_LANES a.lane[l] -= b.lane[l];
  return a;
}
static inline Vec mul(Vec a, Vec b) {
  QFT_LANES a.lane[l] *= b.lane[l];
  return a;
}
static inline Vec fma(Vec a, Vec b, Vec c) {
  QFT_LANES c.lane[l] += a.lane[l] * b.lane[l];
  return c;
}
static inline Vec min(Vec a, Vec b) {
  QFT_LANES a.lane[l] = b.lane[l] < a.lane[l] ? b.lane[l] : a.lane[l];
  return a;
}
static inline Vec max(Vec a, Vec b) {
  QFT_LANES a.lane[l] = b.lane[l] > a.lane[l] ? b.lane[l] : a.lane[l];
  return a;
}
static inline Vec round(Vec a) {  // to nearest even
  QFT_LANES a.lane[l] = std::nearbyintf(a.lane[l]);
  return a;
}
static inline float sum(Vec a) {  // the tree the vector units use, so that every instruction set sums alike
  for (int half = 8; half; half /= 2)
    for (int l = 0; l < half; l++) a.lane[l] += a.lane[l + half];
  return a.lane[0];
}
static inline bool any_not_finite(Vec a) {
  bool bad = false;
  QFT_LANES bad |= (bits_of(a.lane[l]) & 0x7f800000u) == 0x7f800000u;
  return bad;
}

static inline Codes load_bytes(const uint8_t* p) {
  Codes r;
  QFT_LANES r.lane[l] = p[l];
  return r;
}
static inline Codes shift_right(Codes a, int n) {
  QFT_LANES a.lane[l] >>= n;
  return a;
}
static inline Vec to_float(Codes a) {
  Vec r;
  QFT_LANES r.lane[l] = static_cast<float>(a.lane[l]);
  return r;
}
static inline void store_bytes(uint8_t* p, Codes a) { QFT_LANES p[l] = static_cast<uint8_t>(a.lane[l]); }
static inline Codes to_codes(Vec a) {  // of non-negative whole numbers
  Codes r;
  QFT_LANES r.lane[l] = static_cast<uint32_t>(a.lane[l]);
  return r;
}

// A table of up to 16 floats looked up by the low bits of each code.
template <int bits>
struct Table {
  float entry[16];
  explicit Table(const float* levels) { QFT_LANES entry[l] = levels[l & ((1 << bits) - 1)]; }
  Vec operator[](Codes code) const {
    Vec r;
    QFT_LANES r.lane[l] = entry[code.lane[l] & ((1 << bits) - 1)];
    return r;
  }
};

// lanes l of the result hold p[l / repeat]
template <int repeat>
static inline Vec load_repeated(const float* p) {
  Vec r;
  QFT_LANES r.lane[l] = p[l / repeat];
  return r;
}

// how many of the 16 ascending midpoints lie below each lane
static inline Codes rank(Vec a, const float* midpoints) {
  Codes r = {};
  for (int i = 0; i < 15; i++) QFT_LANES r.lane[l] += a.lane[l] > midpoints[i];
  return r;
}

static inline Vec load_bf16(const uint16_t* p) {
  Vec r;
  QFT_LANES r.lane[l] = from_bf16(p[l]);
  return r;
}
static inline Vec load_f16(const uint16_t* p) {
  Vec r;
  QFT_LANES r.lane[l] = from_f16(p[l]);
  return r;
}
static inline void store_bf16(uint16_t* p, Vec a) { QFT_LANES p[l] = to_bf16(a.lane[l]); }
static inline void store_f16(uint16_t* p, Vec a) { QFT_LANES p[l] = to_f16(a.lane[l]); }

// 8 vectors in the order of code_at, stored in the codes' own order
template <int bits>
static inline void store_in_order(float* p, const Vec* v) {
  for (int i = 0; i < 8; i++) QFT_LANES p[code_at(bits, i, l)] = v[i].lane[l];
}
// 128 floats in the codes' own order, loaded in the order of code_at
template <int bits>
static inline void load_permuted(const float* p, Vec* v) {
  for (int i = 0; i < 8; i++) QFT_LANES v[i].lane[l] = p[code_at(bits, i, l)];
}

// 48 bytes of 3-bit codes -> the nibbles' bytes of octets 0..3 of each 32 codes: byte l belongs to the (l / 4)th 32 codes
static inline void unpack3(const uint8_t* p, Codes* octet) {
  for (int sub = 0; sub < 4; sub++) {
    uint32_t word[4];
    std::memcpy(word, p + 12 * sub, 12);
    word[3] = (word[0] >> 3 & 0x11111111u) | (word[1] >> 2 & 0x22222222u) | (word[2] >> 1 & 0x44444444u);
    for (int i = 0; i < 4; i++)
      for (int byte = 0; byte < 4; byte++) octet[i].lane[4 * sub + byte] = word[i] >> (8 * byte) & 0xff;
  }
}

#undef QFT_LANES

}  // namespace qft::scalar

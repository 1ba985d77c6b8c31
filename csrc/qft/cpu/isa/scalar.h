// The vector words of the kernels in plain C++: 16 lanes, one after the other.
#pragma once

#include <cmath>
#include <cstdint>

#include "qft/cpu/numbers.h"
#include "qft/decode.h"

namespace qft::scalar {

constexpr int kTileOutputs = 1;  // outputs and rows of x of a matmul tile
constexpr int kTileRows = 1;
constexpr int kOutputsAtOnce = 1;    // whose sums of a block a tile keeps in registers
constexpr int kCandidates = 1;       // scales that a search tries at a time
constexpr int kUnroll = 1;           // of the 8 vectors of a block: where registers hold them
constexpr bool kHalfTables = false;  // whether tables of 16-bit weights can be looked up
template <int bits>
struct HalfTable;
void finish_streams();

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
static inline Vec div(Vec a, Vec b) {
  QFT_LANES a.lane[l] /= b.lane[l];
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

static inline float lowest(Vec a) {
  float least = a.lane[0];
  QFT_LANES least = a.lane[l] < least ? a.lane[l] : least;
  return least;
}
static inline float highest(Vec a) {
  float most = a.lane[0];
  QFT_LANES most = a.lane[l] > most ? a.lane[l] : most;
  return most;
}

// 16 bytes, 16 little-endian 16-bit or 32-bit words, one a lane
static inline Codes load_bytes(const uint8_t* p) {
  Codes r;
  QFT_LANES r.lane[l] = p[l];
  return r;
}
static inline Codes load_halves(const uint8_t* p) {
  Codes r;
  QFT_LANES r.lane[l] = static_cast<uint32_t>(p[2 * l] | p[2 * l + 1] << 8);
  return r;
}
static inline Codes load_words(const uint8_t* p) {
  Codes r;
  std::memcpy(r.lane, p, 64);
  return r;
}
// four 12-byte records of 3-bit codes -> four words of 8 nibbles each; the fourth is spelled by the others' spare bits
static inline Codes load_records(const uint8_t* p) {
  Codes r;
  for (int record = 0; record < 4; record++) {
    uint32_t* word = r.lane + 4 * record;
    std::memcpy(word, p + 12 * record, 12);
    word[3] = (word[0] >> 3 & 0x11111111u) | (word[1] >> 2 & 0x22222222u) | (word[2] >> 1 & 0x44444444u);
  }
  return r;
}
// 128 bytes: lane l takes bytes 8 l .. 8 l + 3 in low, the next four in high
static inline void load_octets(const uint8_t* p, Codes* low, Codes* high) {
  QFT_LANES {
    std::memcpy(&low->lane[l], p + 8 * l, 4);
    std::memcpy(&high->lane[l], p + 8 * l + 4, 4);
  }
}
// codes 16 i + l of words that hold 8 each, brought to the bottom of lane l
template <int stride>
static inline Codes in_order(Codes words, int i) {
  Codes r;
  QFT_LANES r.lane[l] = words.lane[2 * i + l / 8] >> (stride * (l % 8));
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
static inline Vec low_byte_above_2_23(Codes a) {  // 2^23 + the byte: its bits are the mantissa's lowest
  Vec r;
  QFT_LANES r.lane[l] = float_of((a.lane[l] & 0xff) | 0x4b000000u);
  return r;
}
static inline Codes to_codes(Vec a) {  // of non-negative whole numbers
  Codes r;
  QFT_LANES r.lane[l] = static_cast<uint32_t>(a.lane[l]);
  return r;
}
static inline void store_bytes(uint8_t* p, Codes a) { QFT_LANES p[l] = static_cast<uint8_t>(a.lane[l]); }
static inline void store_bytes_through(uint8_t* p, Codes a, const uint8_t* table) { QFT_LANES p[l] = table[a.lane[l]]; }
static inline Vec gather(const float* table, const uint8_t* p) {
  Vec r;
  QFT_LANES r.lane[l] = table[p[l]];
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
  // code v of each lane's eight, `stride` bits apart
  template <int stride>
  Vec code(Codes words, int v) const {
    return (*this)[shift_right(words, stride * v)];
  }
  void set_weights(const Table& levels, Vec scale, Vec zero_point) {
    QFT_LANES entry[l] = (levels.entry[l] - zero_point.lane[0]) * scale.lane[0];
  }
};

// spreads `count` numbers, 1, 2 or 4, over the lanes: each to 16 / count of them
struct LaneScales {
  int count;
  explicit LaneScales(int numbers) : count(numbers) {}
  Vec operator()(const float* p) const {
    Vec r;
    QFT_LANES r.lane[l] = p[l * count / 16];
    return r;
  }
};

// how many of the ascending midpoints lie below each lane
template <int bits>
static inline Codes rank(Vec a, const float* midpoints) {
  Codes r = {};
  for (int i = 0; i < (1 << bits) - 1; i++) QFT_LANES r.lane[l] += a.lane[l] > midpoints[i];
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

#undef QFT_LANES

}  // namespace qft::scalar

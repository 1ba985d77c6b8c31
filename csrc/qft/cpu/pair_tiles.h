// The dense part of a product of many rows, by dot products of bf16: lanes are rows of x or dy, which are packed for it
// once, and every broadcast is a pair of weights. Where the weights come from is not known here.
#pragma once

#include "qft/cpu/arrays.h"

namespace qft::QFT_ISA {

constexpr int kStripVectors = 3;  // of rows: with 8 outputs, 24 of the 32 registers hold sums
constexpr int kStripRows = 16 * kStripVectors;
constexpr int kTileColumns = 8;

// Rows of a dense operand: [strip of rows][pair][row of the strip]. The last strip is as narrow as whole vectors allow.
struct Strips {
  int64_t rows;   // a multiple of 16, zeros past the operand's
  int64_t pairs;  // of a row, likewise

  int64_t count() const { return (rows + kStripRows - 1) / kStripRows; }
  int vectors(int64_t strip) const { return static_cast<int>(least(rows - strip * kStripRows, kStripRows) / 16); }
  // of a strip's rows from a pair on
  int64_t offset(int64_t strip, int64_t pair) const { return strip * kStripRows * pairs + 16 * vectors(strip) * pair; }
};

// Which pairs of a row's 128 numbers lie in which lanes of four vectors.
using LoadPairs = void (*)(const uint16_t*, int64_t count, Pairs (&)[4]);

static inline void load_neighbours(const uint16_t* p, int64_t count, Pairs (&pairs)[4]) {
  for (int i = 0; i < 4; i++) pairs[i] = load_pairs_up_to(p + 32 * i, count - 32 * i);
}

// `rows` rows of `width` bf16 numbers into strips; shared among the team
template <LoadPairs load>
static void pack(const uint16_t* from, int64_t rows, int64_t width, const Strips& strips, uint32_t* to) {
  const int64_t count = blocks(width), sixteens = strips.rows / 16;
#pragma omp for schedule(static)
  for (int64_t i = 0; i < sixteens * count; i++) {
    const int64_t first = i / count * 16, column = i % count * kBlock, strip = first / kStripRows;
    Pairs read[16][4], tile[16];
    for (int r = 0; r < 16; r++)
      load(from + (first + r) * width + column, first + r < rows ? width - column : 0, read[r]);
    for (int v = 0; v < 4; v++) {
      for (int r = 0; r < 16; r++) tile[r] = read[r][v];
      transpose(tile);
      uint32_t* const at = to + strips.offset(strip, column / 2 + 16 * v) + (first - strip * kStripRows);
      for (int pair = 0; pair < 16; pair++) store_pairs(at + pair * 16 * strips.vectors(strip), tile[pair]);
    }
  }
}

// Pairs of weights of kTileColumns outputs: number s of output o is at[o * by_output + s * by_step].
struct WeightPairs {
  const uint32_t* at;
  int64_t by_output, by_step;
};

// Adds `steps` pairs to sums[output][row], which start at zero where `fresh`.
template <int vectors>
static void add_tile(const WeightPairs& w, const uint32_t* x, int64_t steps, float* sums, int64_t stride, bool fresh) {
  Vec total[kTileColumns][vectors];
#pragma GCC unroll 8
  for (int o = 0; o < kTileColumns; o++)
#pragma GCC unroll 3
    for (int i = 0; i < vectors; i++) total[o][i] = fresh ? zero() : load(sums + o * stride + 16 * i);
  const uint32_t* at = w.at;
  for (int64_t s = 0; s < steps; s++, at += w.by_step, x += 16 * vectors) {
    Pairs rows[vectors];
#pragma GCC unroll 3
    for (int i = 0; i < vectors; i++) rows[i] = load_pairs(x + 16 * i);
#pragma GCC unroll 8
    for (int o = 0; o < kTileColumns; o++) {
      const Pairs weight = broadcast_pair(at + o * w.by_output);
#pragma GCC unroll 3
      for (int i = 0; i < vectors; i++) total[o][i] = dot(total[o][i], rows[i], weight);
    }
  }
#pragma GCC unroll 8
  for (int o = 0; o < kTileColumns; o++)
#pragma GCC unroll 3
    for (int i = 0; i < vectors; i++) store(sums + o * stride + 16 * i, total[o][i]);
}

// The same for one strip of rows, pairs first .. first + steps - 1.
static inline void add_strip(const WeightPairs& w, const Strips& strips, const uint32_t* packed, int64_t strip,
                             int64_t first, int64_t steps, float* sums, int64_t stride) {
  const uint32_t* const x = packed + strips.offset(strip, first);
  switch (strips.vectors(strip)) {
    case 1:
      return add_tile<1>(w, x, steps, sums, stride, first == 0);
    case 2:
      return add_tile<2>(w, x, steps, sums, stride, first == 0);
    default:
      return add_tile<3>(w, x, steps, sums, stride, first == 0);
  }
}

// sums[outputs padded to 16][stride] -> to[rows][outputs] in bf16
static inline void store_transposed(const float* sums, int64_t stride, int64_t outputs, int64_t rows, uint16_t* to,
                                    int64_t to_stride) {
  for (int64_t r = 0; r < rows; r += 16)
    for (int64_t o = 0; o < outputs; o += 16) {
      __m512i tile[16];
      for (int i = 0; i < 16; i++) tile[i] = load_pairs(sums + (o + i) * stride + r);
      transpose(tile);
      for (int i = 0; i < least(16, rows - r); i++)
        store_bf16_up_to(to + (r + i) * to_stride + o, _mm512_castsi512_ps(tile[i]), outputs - o);
    }
}

}  // namespace qft::QFT_ISA

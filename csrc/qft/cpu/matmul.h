// matmul: y = x Wt for a few rows of x. A thread takes a tile of outputs at a time; each code is looked up once per
// tile of rows, and every product of a block is summed before the group's scale multiplies it.
#pragma once

#include "qft/cpu/companions.h"
#include "qft/cpu/decoder.h"
#include "qft/launch.h"

namespace qft::QFT_ISA {

// x[rows][in] -> fp32 [rows][blocks * 128] in the order of code_at, zeros past the end; shared among the team
static inline void permute_rows(const MatmulArgs& a) {
  const int64_t in = a.weight.in, count = blocks(in);
#pragma omp for schedule(static)
  for (int64_t i = 0; i < a.rows * count; i++) {
    const int64_t r = i / count, b = i % count;
    float dense[kBlock], *permuted = a.workspace + i * kBlock;
    read_run(a.x, r * in + b * kBlock, least(kBlock, in - b * kBlock), a.dtype, dense, kBlock);
    for (int v = 0; v < 8; v++)
      for (int l = 0; l < 16; l++) permuted[16 * v + l] = dense[code_at(v, l)];
  }
}

// One tile: kTileOutputs rows of W against `rows` rows of x. Shifted formats subtract
// zero points.
template <class F, int rows, bool shifted>
struct MatmulTile {
  const Decoder<F>& decoder;
  const Grouping& grouping;
  const uint8_t* codes[kTileOutputs];
  const float* scales[kTileOutputs];
  const float* zeros[kTileOutputs];
  const float* x;
  int64_t x_stride;
  Vec sums[rows][kTileOutputs];

  // adds block b, whose codes lie at p[o]
  inline __attribute__((always_inline)) void add(const uint8_t* const* p, int64_t b) {
    typename Decoder<F>::Words words[kTileOutputs];
    Vec zero_points[kTileOutputs], partial[rows][kTileOutputs];
#pragma GCC unroll 4
    for (int o = 0; o < kTileOutputs; o++) {
      words[o] = Decoder<F>::words(p[o]);
      if (shifted) zero_points[o] = grouping.lanes(zeros[o], b);
    }
#pragma GCC unroll kUnroll
    for (int v = 0; v < 8; v++) {
      Vec in[rows];
#pragma GCC unroll 4
      for (int r = 0; r < rows; r++) in[r] = load(x + r * x_stride + b * kBlock + 16 * v);
#pragma GCC unroll 4
      for (int o = 0; o < kTileOutputs; o++) {
        Vec level = decoder.levels(words[o], v);
        if (shifted) level = sub(level, zero_points[o]);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) partial[r][o] = v == 0 ? mul(level, in[r]) : fma(level, in[r], partial[r][o]);
      }
    }
#pragma GCC unroll 4
    for (int o = 0; o < kTileOutputs; o++) {
      const Vec scale = grouping.lanes(scales[o], b);
#pragma GCC unroll 4
      for (int r = 0; r < rows; r++) sums[r][o] = fma(partial[r][o], scale, sums[r][o]);
    }
  }

  void run() {
    constexpr int64_t bytes = Decoder<F>::block_bytes;
    for (int r = 0; r < rows; r++)
      for (int o = 0; o < kTileOutputs; o++) sums[r][o] = zero();
    const int64_t count = blocks(decoder.w.in), whole = least(count, decoder.whole_blocks());
    const uint8_t* p[kTileOutputs];
    for (int64_t b = 0; b < whole; b++) {
      for (int o = 0; o < kTileOutputs; o++) {
        p[o] = codes[o] + b * bytes;
        __builtin_prefetch(p[o] + kTileOutputs * decoder.w.row_bytes);  // the next tile's
      }
      add(p, b);
    }
    if (whole < count) {
      uint8_t copies[kTileOutputs][bytes];
      for (int o = 0; o < kTileOutputs; o++) p[o] = decoder.block(codes[o], whole, copies[o]);
      add(p, whole);
    }
  }
};

// Outputs o .. o + kTileOutputs - 1 of all rows, the last of them repeated where W ends.
template <class F, bool shifted>
struct MatmulOutputs {
  const MatmulArgs& a;
  const Decoder<F>& decoder;
  const Grouping& grouping;
  int64_t first;
  const float* scales[kTileOutputs];
  const float* zeros[kTileOutputs];

  template <int rows>
  void tile(int64_t row) const {
    const Weight& w = a.weight;
    const int64_t padded = blocks(w.in) * kBlock;
    MatmulTile<F, rows, shifted> tile{decoder, grouping, {}, {}, {}, a.workspace + row * padded, padded, {}};
    for (int o = 0; o < kTileOutputs; o++) {
      tile.codes[o] = decoder.row(least(first + o, w.out - 1));
      tile.scales[o] = scales[o];
      tile.zeros[o] = zeros[o];
    }
    tile.run();
    for (int r = 0; r < rows; r++)
      for (int o = 0; o < kTileOutputs && first + o < w.out; o++)
        write(a.y, (row + r) * w.out + first + o, sum(tile.sums[r][o]), a.dtype);
  }

  void run() const {
    int64_t row = 0;
    if constexpr (kTileRows >= 4)
      for (; row + 4 <= a.rows; row += 4) tile<4>(row);
    if constexpr (kTileRows >= 2)
      for (; row + 2 <= a.rows; row += 2) tile<2>(row);
    for (; row < a.rows; row++) tile<1>(row);
  }
};

template <class F, bool shifted>
static void matmul_shifted(const MatmulArgs& a) {
  const Weight& w = a.weight;
  const Grouping grouping(w);
  const Decoder<F> decoder(w);
  const Companion scales = Companion::scales(w, grouping), zeros = Companion::zeros(w, grouping);
  const int64_t scale_floats = scales.row_floats(), zero_floats = zeros.row_floats(), count = blocks(w.in);
#pragma omp parallel num_threads(a.place.threads)
  {
    permute_rows(a);
    Scratch scale_rows(kTileOutputs * scale_floats), zero_rows(kTileOutputs * zero_floats);
#pragma omp for schedule(dynamic, 4)
    for (int64_t tile = 0; tile < (w.out + kTileOutputs - 1) / kTileOutputs; tile++) {
      MatmulOutputs<F, shifted> outputs{a, decoder, grouping, tile * kTileOutputs, {}, {}};
      for (int o = 0; o < kTileOutputs; o++) {
        const int64_t row = least(outputs.first + o, w.out - 1);
        outputs.scales[o] = scales.row(row, 0, count, scale_rows.data + o * scale_floats);
        outputs.zeros[o] = zeros.row(row, 0, count, zero_rows.data + o * zero_floats);
      }
      outputs.run();
    }
  }
}

template <class F>
static void matmul(const MatmulArgs& a) {
  if constexpr (F::kind == Levels::integer)
    if (a.weight.zeros) return matmul_shifted<F, true>(a);
  matmul_shifted<F, false>(a);
}

// the activations of each row, permuted, in fp32
static int64_t matmul_workspace(int64_t, int64_t in, int64_t rows, int) { return rows * blocks(in) * kBlock; }

}  // namespace qft::QFT_ISA

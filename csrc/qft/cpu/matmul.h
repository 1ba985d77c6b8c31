// matmul: y = x Wt for a few rows of x. A thread takes a tile of outputs at a time; each code is looked up once per
// tile of rows, and every product of a block is summed before the group's scale multiplies it, which leaves the sums of
// neighbouring blocks independent of each other.
#pragma once

#include "qft/cpu/ahead.h"
#include "qft/cpu/companions.h"
#include "qft/cpu/decoder.h"
#include "qft/launch.h"

namespace qft::QFT_ISA {

// Threads of a product: one where it takes less than five microseconds or so, else all. Never some: libgomp ends the
// threads that a smaller team leaves out, and the next product waits a tenth of a millisecond for new ones.
static inline int team(int threads, int64_t products) { return products < 1 << 18 ? 1 : threads; }

// x[rows][in] -> fp32 [blocks][rows][128] in the decoder's order and unit, zeros past the end; shared among the team
template <class F>
static void permute_rows(const MatmulArgs& a, const Decoder<F>& decoder, float* to) {
  const int64_t in = a.weight.in, count = blocks(in);
#pragma omp for schedule(static)
  for (int64_t i = 0; i < a.rows * count; i++) {
    const int64_t b = i / a.rows, r = i % a.rows;
    float dense[kBlock], *permuted = to + i * kBlock;
    read_run(a.x, r * in + b * kBlock, least(kBlock, in - b * kBlock), a.dtype, dense, kBlock);
    for (int v = 0; v < 8; v++)
      for (int l = 0; l < 16; l++) permuted[16 * v + l] = dense[decoder.column(v, l)] * decoder.bytes.unit;
  }
}

// Where the codes, scales and zero points of a tile's outputs lie: those past the end of W repeat its last.
struct TileRows {
  const uint8_t* codes[kTileOutputs];
  const float* scales[kTileOutputs];
  const float* zeros[kTileOutputs];
};

// One tile: kTileOutputs rows of W against `rows` rows of x. Shifted formats subtract zero points.
template <class F, int rows, bool shifted>
struct MatmulTile {
  using Words = typename Decoder<F>::Words;
  // Outputs whose words are made before the first of them is used: all, for what waits for the few steps to 3-bit words
  // fills a processor's queues. Words of 4 bits lie ready in memory.
  static constexpr int kEarly = F::bits == 4 ? kOutputsAtOnce : kTileOutputs;

  const Decoder<F>& decoder;
  const Grouping& grouping;
  const TileRows& w;
  const float* x;    // of block 0
  int64_t x_stride;  // from block to block
  Vec sums[rows][kTileOutputs];

  // adds block b for the tile's outputs from `first` on, kOutputsAtOnce of them, whose sums of the block registers hold
  inline __attribute__((always_inline)) void add(const Words* words, int64_t b, int first) {
    Vec zero_point[kOutputsAtOnce], partial[rows][kOutputsAtOnce];
#pragma GCC unroll 4
    for (int o = 0; o < kOutputsAtOnce; o++)
      if (shifted) zero_point[o] = grouping.lanes(w.zeros[first + o], b);
    const float* in = x + b * x_stride;
#pragma GCC unroll kUnroll
    for (int v = 0; v < 8; v++) {
      Vec level[kOutputsAtOnce];
#pragma GCC unroll 4
      for (int o = 0; o < kOutputsAtOnce; o++) {
        level[o] = decoder.levels(words[o], v);
        if (shifted) level[o] = sub(level[o], zero_point[o]);
      }
#pragma GCC unroll 4
      for (int r = 0; r < rows; r++) {
        const Vec one = load(in + r * kBlock + 16 * v);
#pragma GCC unroll 4
        for (int o = 0; o < kOutputsAtOnce; o++)
          partial[r][o] = v == 0 ? mul(level[o], one) : fma(level[o], one, partial[r][o]);
      }
    }
#pragma GCC unroll 4
    for (int o = 0; o < kOutputsAtOnce; o++) {
      const Vec scale = grouping.lanes(w.scales[first + o], b);
#pragma GCC unroll 4
      for (int r = 0; r < rows; r++) sums[r][first + o] = fma(partial[r][o], scale, sums[r][first + o]);
    }
  }

  void run(Ahead ahead) {
    constexpr int64_t bytes = Decoder<F>::block_bytes;
    for (int r = 0; r < rows; r++)
      for (int o = 0; o < kTileOutputs; o++) sums[r][o] = zero();
    const int64_t count = blocks(decoder.w.in), whole = least(count, decoder.whole_blocks());
    for (int64_t b = 0; b < whole; b++) {
      const uint8_t* p[kTileOutputs];
      ahead.template ask<kTileOutputs * bytes, shifted>();
      for (int o = 0; o < kTileOutputs; o++) p[o] = w.codes[o] + b * bytes;
#pragma GCC unroll 4
      for (int o = 0; o < kTileOutputs; o += kEarly) {
        Words words[kEarly];
#pragma GCC unroll 4
        for (int i = 0; i < kEarly; i++) words[i] = Decoder<F>::words(p[o + i]);
#pragma GCC unroll 4
        for (int i = 0; i < kEarly; i += kOutputsAtOnce) add(words + i, b, o + i);
      }
    }
    if (whole < count) {
      uint8_t copy[bytes];
      Words words[kTileOutputs];
      for (int o = 0; o < kTileOutputs; o++) words[o] = Decoder<F>::words(decoder.block(w.codes[o], whole, copy));
#pragma GCC unroll 4
      for (int o = 0; o < kTileOutputs; o += kOutputsAtOnce) add(words + o, whole, o);
    }
  }
};

// A tile's outputs for all rows.
template <class F, bool shifted>
struct MatmulOutputs {
  const MatmulArgs& a;
  const Decoder<F>& decoder;
  const Grouping& grouping;
  const float* x;  // as permute_rows lays it out
  int64_t first;
  const Ahead& ahead;
  TileRows w;

  template <int rows>
  void tile(int64_t row) const {
    MatmulTile<F, rows, shifted> tile{decoder, grouping, w, x + row * kBlock, a.rows * kBlock, {}};
    tile.run(ahead);
    for (int r = 0; r < rows; r++)
      for (int o = 0; o < kTileOutputs && first + o < a.weight.out; o++)
        write(a.y, (row + r) * a.weight.out + first + o, sum(tile.sums[r][o]), a.dtype);
  }

  void run() const {
    int64_t row = 0;
    for (; row + kTileRows <= a.rows; row += kTileRows) tile<kTileRows>(row);
    const int64_t left = a.rows - row;
    if constexpr (kTileRows > 3)
      if (left == 3) return tile<3>(row);
    if constexpr (kTileRows > 2)
      if (left == 2) return tile<2>(row);
    if (left == 1) tile<1>(row);
  }
};

template <class F, bool shifted>
static void matmul_shifted(const MatmulArgs& a) {
  const Weight& w = a.weight;
  const Grouping grouping(w);
  const Decoder<F> decoder(w);
  const Companion scales = Companion::scales(w, grouping), zeros = Companion::zeros(w, grouping);
  const int64_t scale_floats = scales.row_floats(), zero_floats = zeros.row_floats(), count = blocks(w.in);
  const int64_t tiles = (w.out + kTileOutputs - 1) / kTileOutputs;
  const int threads = team(a.place.threads, w.out * w.in * a.rows);
  const int64_t chunk = tiles_at_a_time(tiles, threads);
  const Scratch x(a.rows * count * kBlock);
#pragma omp parallel num_threads(threads)
  {
    permute_rows(a, decoder, x.data);
    Scratch scale_rows(kTileOutputs * scale_floats), zero_rows(kTileOutputs * zero_floats);
#pragma omp for schedule(dynamic, chunk)
    for (int64_t tile = 0; tile < tiles; tile++) {
      const int64_t first = tile * kTileOutputs;
      MatmulOutputs<F, shifted> outputs{a, decoder, grouping, x.data, first, Ahead(w, scales, zeros, first), {}};
      for (int o = 0; o < kTileOutputs; o++) {
        const int64_t row = least(first + o, w.out - 1);
        outputs.w.codes[o] = decoder.row(row);
        outputs.w.scales[o] = scales.row(row, 0, count, scale_rows.data + o * scale_floats);
        outputs.w.zeros[o] = zeros.row(row, 0, count, zero_rows.data + o * zero_floats);
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

static int64_t matmul_workspace(int64_t, int64_t, int64_t, int) { return 0; }

}  // namespace qft::QFT_ISA

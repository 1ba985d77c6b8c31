// matmul_t: dx = dy W for a few rows of dy. A thread owns a stripe of columns and adds the rows of W in order, a tile
// of them at a time; the sums stay in the decoder's order until they are stored.
#pragma once

#include "qft/cpu/ahead.h"
#include "qft/cpu/companions.h"
#include "qft/cpu/decoder.h"
#include "qft/launch.h"

namespace qft::QFT_ISA {

constexpr int64_t kChunk = 256;             // rows of W whose dy is held in fp32 at a time
constexpr int64_t kStripeFloats = 8 << 10;  // sums of a stripe: they stay in the first-level cache

// One tile: kTileOutputs rows of W into the sums of `rows` rows of dx.
template <class F, int rows, bool shifted>
struct MatmulTTile {
  const Decoder<F>& decoder;
  typename Decoder<F>::Words words[kTileOutputs];
  Vec scales[kTileOutputs], zeros[kTileOutputs];

  // dy[r * kChunk + o]: a weight's share of dx is level * (scale * dy)
  inline __attribute__((always_inline)) void add(const float* dy, float* sums, int64_t stride) const {
    Vec factors[rows][kTileOutputs];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
      for (int o = 0; o < kTileOutputs; o++) factors[r][o] = mul(scales[o], broadcast(dy[r * kChunk + o]));
#pragma GCC unroll kUnroll
    for (int v = 0; v < 8; v++) {
      Vec level[kTileOutputs];
#pragma GCC unroll 4
      for (int o = 0; o < kTileOutputs; o++) {
        level[o] = decoder.levels(words[o], v);
        if (shifted) level[o] = sub(level[o], zeros[o]);
      }
#pragma GCC unroll 4
      for (int r = 0; r < rows; r++) {
        Vec total = load(sums + r * stride + 16 * v);
#pragma GCC unroll 4
        for (int o = 0; o < kTileOutputs; o++) total = fma(level[o], factors[r][o], total);
        store(sums + r * stride + 16 * v, total);
      }
    }
  }
};

template <class F, bool shifted>
struct MatmulTStripe {
  const MatmulTArgs& a;
  const Decoder<F>& decoder;
  const Grouping& grouping;
  const Companion& scales;
  const Companion& zeros;
  int64_t first, last;  // blocks
  float* sums;          // [rows][width]
  int64_t width;        // floats
  float* dy;            // [rows][kChunk]
  float* scale_rows;
  float* zero_rows;

  template <int rows>
  void rows_of_block(const uint8_t* const* p, const float* const* scale, const float* const* zero_point, int64_t b,
                     int64_t row, int64_t chunk_row) const {
    MatmulTTile<F, rows, shifted> tile{decoder, {}, {}, {}};
    for (int o = 0; o < kTileOutputs; o++) {
      tile.words[o] = Decoder<F>::words(p[o]);
      tile.scales[o] = grouping.lanes(scale[o], b);
      if (shifted) tile.zeros[o] = grouping.lanes(zero_point[o], b);
    }
    tile.add(dy + row * kChunk + chunk_row, sums + row * width + (b - first) * kBlock, width);
  }

  // adds rows o .. o + kTileOutputs - 1 of W, whose dy lies at chunk_row; past W's end dy is 0 and the last row is
  // repeated
  void add_rows(int64_t o, int64_t chunk_row) const {
    const Weight& w = a.weight;
    const uint8_t* codes[kTileOutputs];
    const float *scale[kTileOutputs], *zero_point[kTileOutputs];
    for (int i = 0; i < kTileOutputs; i++) {
      const int64_t row = least(o + i, w.out - 1);
      ask_for(w, scales, zeros, least(row + 2 * kTileOutputs, w.out - 1), first, last, Decoder<F>::block_bytes);
      codes[i] = decoder.row(row);
      scale[i] = scales.row(row, first, last, scale_rows + i * scales.row_floats());
      zero_point[i] = zeros.row(row, first, last, zero_rows + i * zeros.row_floats());
    }
    for (int64_t b = first; b < last; b++) {
      uint8_t copies[kTileOutputs][Decoder<F>::block_bytes];
      const uint8_t* p[kTileOutputs];
      for (int i = 0; i < kTileOutputs; i++) p[i] = decoder.block(codes[i], b, copies[i]);
      int64_t row = 0;
      if constexpr (kTileRows >= 4)
        for (; row + 4 <= a.rows; row += 4) rows_of_block<4>(p, scale, zero_point, b, row, chunk_row);
      if constexpr (kTileRows >= 2)
        for (; row + 2 <= a.rows; row += 2) rows_of_block<2>(p, scale, zero_point, b, row, chunk_row);
      for (; row < a.rows; row++) rows_of_block<1>(p, scale, zero_point, b, row, chunk_row);
    }
  }

  // in the decoder's unit, zeros past `count`
  void read_dy(int64_t row, int64_t chunk, int64_t count) const {
    float* const to = dy + row * kChunk;
    read_run(a.dy, row * a.weight.out + chunk, count, a.dtype, to, kChunk);
    for (int64_t i = 0; i < kChunk; i++) to[i] *= decoder.bytes.unit;
  }

  void write_sums() const {
    for (int64_t row = 0; row < a.rows; row++)
      for (int64_t b = first; b < last; b++) {
        const float* permuted = sums + row * width + (b - first) * kBlock;
        float dense[kBlock];
        for (int v = 0; v < 8; v++)
          for (int l = 0; l < 16; l++) dense[decoder.column(v, l)] = permuted[16 * v + l];
        write_run(a.dx, row * a.weight.in + b * kBlock, least(kBlock, a.weight.in - b * kBlock), a.dtype, dense);
      }
  }

  void run() const {
    for (int64_t i = 0; i < a.rows * width; i++) sums[i] = 0;
    for (int64_t chunk = 0; chunk < a.weight.out; chunk += kChunk) {
      const int64_t count = least(kChunk, a.weight.out - chunk);
      for (int64_t row = 0; row < a.rows; row++) read_dy(row, chunk, count);
      for (int64_t o = 0; o < count; o += kTileOutputs) add_rows(chunk + o, o);
    }
    write_sums();
  }
};

// Blocks of a stripe: what the first-level cache holds, and enough stripes for all threads. No sum crosses columns, so
// the bits do not depend on it.
static inline int64_t stripe_blocks(int64_t count, int64_t rows, int threads) {
  const int64_t fit = rows ? kStripeFloats / (rows * kBlock) : count, share = (count + threads - 1) / threads;
  const int64_t size = least(fit, share);
  return size > 1 ? size : 1;
}

template <class F, bool shifted>
static void matmul_t_shifted(const MatmulTArgs& a) {
  const Weight& w = a.weight;
  const Grouping grouping(w);
  const Decoder<F> decoder(w);
  const Companion scales = Companion::scales(w, grouping), zeros = Companion::zeros(w, grouping);
  const int64_t count = blocks(w.in), size = stripe_blocks(count, a.rows, a.place.threads);
#pragma omp parallel num_threads(a.place.threads)
  {
    Scratch sums(a.rows * size * kBlock), dy(a.rows * kChunk);
    Scratch scale_rows(kTileOutputs * scales.row_floats()), zero_rows(kTileOutputs * zeros.row_floats());
#pragma omp for schedule(dynamic, 1)
    for (int64_t stripe = 0; stripe < (count + size - 1) / size; stripe++)
      MatmulTStripe<F, shifted>{a,
                                decoder,
                                grouping,
                                scales,
                                zeros,
                                stripe * size,
                                least((stripe + 1) * size, count),
                                sums.data,
                                size * kBlock,
                                dy.data,
                                scale_rows.data,
                                zero_rows.data}
          .run();
  }
}

template <class F>
static void matmul_t(const MatmulTArgs& a) {
  if constexpr (F::kind == Levels::integer)
    if (a.weight.zeros) return matmul_t_shifted<F, true>(a);
  matmul_t_shifted<F, false>(a);
}

}  // namespace qft::QFT_ISA

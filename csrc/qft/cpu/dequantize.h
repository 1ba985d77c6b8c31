// dequantize: fp32 level x scale, rounded once to the dtype asked for.
#pragma once

#include "qft/cpu/companions.h"
#include "qft/cpu/decoder.h"
#include "qft/launch.h"

namespace qft::QFT_ISA {

template <class F>
struct DenseRow {
  const Decoder<F>& decoder;
  const Grouping& grouping;
  const uint8_t* codes;
  const float* scales;
  const float* zeros;  // or null

  // calls put(i, weights) for the vectors i of block b, in order
  template <class Put>
  void block(int64_t b, Put put) const {
    uint8_t copy[Decoder<F>::block_bytes];
    const uint8_t* p = decoder.block(codes, b, copy);
    const auto words = Decoder<F>::words(p);
#pragma GCC unroll kUnroll
    for (int i = 0; i < 8; i++) {
      const int64_t group = grouping.of_sub(b, i / 2);
      Vec v = decoder.levels_in_order(p, words, i);
      if (zeros) v = sub(v, broadcast(zeros[group]));
      put(i, mul(v, broadcast(scales[group])));
    }
  }
};

template <class F>
static void dequantize(const DequantizeArgs& a) {
  const Weight& w = a.weight;
  const Decoder<F> decoder(w);
  const Grouping grouping(w);
  const Companion scales = Companion::scales(w, grouping), zeros = Companion::zeros(w, grouping);
  const int64_t first = a.col0 / kBlock, last = blocks(a.col1), whole = a.col1 / kBlock;
#pragma omp parallel num_threads(a.place.threads)
  {
    Scratch scale_row(scales.row_floats()), zero_row(zeros.row_floats());
#pragma omp for schedule(static)
    for (int64_t o = a.row0; o < a.row1; o++) {
      const DenseRow<F> row{decoder, grouping, decoder.row(o), scales.row(o, first, last, scale_row.data),
                            zeros.row(o, first, last, zero_row.data)};
      const int64_t start = (o - a.row0) * a.stride - a.col0;
      for (int64_t b = first; b < whole; b++)
        row.block(b, [&](int i, Vec v) { store_as(a.out, start + b * kBlock + 16 * i, v, a.dtype); });
      if (whole < last) {
        float dense[kBlock];
        row.block(whole, [&](int i, Vec v) { store(dense + 16 * i, v); });
        write_run(a.out, start + whole * kBlock, a.col1 - whole * kBlock, a.dtype, dense);
      }
    }
  }
}

}  // namespace qft::QFT_ISA

// zero_scale_grad: the gradient of scales that are 0. Their outputs are 0 and say nothing, so the sum is taken in full.
#pragma once

#include "qft/cpu/companions.h"
#include "qft/cpu/decoder.h"
#include "qft/launch.h"

namespace qft::QFT_ISA {

// A row's levels less its zero point, up to whole blocks.
template <class F>
static void read_levels(const Decoder<F>& decoder, int64_t o, float zero_point, float* to) {
  for (int64_t b = 0; b < blocks(decoder.w.in); b++) {
    uint8_t copy[Decoder<F>::block_bytes];
    const uint8_t* p = decoder.block(decoder.row(o), b, copy);
    const auto words = Decoder<F>::words(p);
    for (int i = 0; i < kBlock / 16; i++)
      store(to + b * kBlock + 16 * i, sub(decoder.levels_in_order(p, words, i), broadcast(zero_point)));
  }
}

// levels . x[row], in the order of the columns
static inline float dot(const float* levels, const void* x, int64_t at, int64_t count, Dtype dtype) {
  Vec sums = zero();
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) sums = fma(load(levels + i), load_as(x, at + i, dtype), sums);
  float total = sum(sums);
  for (; i < count; i++) total += levels[i] * read(x, at + i, dtype);
  return total;
}

template <class F>
static void zero_scale_grad(const ZeroScaleGradArgs& a) {
  const Weight& w = a.weight;
  const Decoder<F> decoder(w);
  const Grouping grouping(w);
  const Companion scales = Companion::scales(w, grouping), zeros = Companion::zeros(w, grouping);
#pragma omp parallel num_threads(a.place.threads)
  {
    Scratch levels(blocks(w.in) * kBlock), scale_row(scales.row_floats()), zero_row(zeros.row_floats());
#pragma omp for schedule(dynamic, 16)
    for (int64_t o = 0; o < w.out; o++) {
      if (scales.row(o, 0, 1, scale_row.data)[0] != 0) continue;
      const float* zero_point = zeros.row(o, 0, 1, zero_row.data);
      read_levels<F>(decoder, o, zero_point ? zero_point[0] : 0, levels.data);
      float total = 0;
      for (int64_t row = 0; row < a.rows; row++)
        total += read(a.dy, row * w.out + o, a.dtype) * dot(levels.data, a.x, row * w.in, w.in, a.dtype);
      a.ds[o] = total;
    }
  }
}

}  // namespace qft::QFT_ISA

// scale_grad: a weight gradient, reduced to one number per group against the levels.
#pragma once

#include "qft/cpu/companions.h"
#include "qft/cpu/decoder.h"
#include "qft/launch.h"

namespace qft::QFT_ISA {

template <class F>
static void scale_grad(const ScaleGradArgs& a) {
  const Weight& w = a.weight;
  const Decoder<F> decoder(w);
  const Grouping grouping(w);
  const Companion zeros = Companion::zeros(w, grouping);
  const int64_t count = blocks(w.in);
#pragma omp parallel num_threads(a.place.threads)
  {
    Scratch zero_row(zeros.row_floats());
#pragma omp for schedule(static)
    for (int64_t o = a.row0; o < a.row1; o++) {
      const float* zero = zeros.row(o, 0, count, zero_row.data);
      float* ds = a.ds + (o - a.row0) * w.groups;
      Vec sums = qft::QFT_ISA::zero();
      int64_t group = 0;
      for (int64_t b = 0; b < count; b++) {
        uint8_t copy[Decoder<F>::block_bytes];
        const uint8_t* p = decoder.block(decoder.row(o), b, copy);
        const auto words = Decoder<F>::words(p);
        const int64_t at = (o - a.row0) * w.in + b * kBlock, columns = least(kBlock, w.in - b * kBlock);
        float cut[kBlock];  // the gradient under a last block that is cut short, zeros after it
        if (columns < kBlock) read_run(a.dw, at, columns, a.dtype, cut, kBlock);
        for (int i = 0; i < 8 && 16 * i < columns; i++) {
          const int64_t now = grouping.of_sub(b, i / 2);
          if (now != group) {
            ds[group] = sum(sums);
            sums = qft::QFT_ISA::zero();
            group = now;
          }
          Vec level = decoder.levels_in_order(p, words, i);
          if (zero) level = sub(level, broadcast(zero[now]));
          sums = fma(level, columns < kBlock ? load(cut + 16 * i) : load_as(a.dw, at + 16 * i, a.dtype), sums);
        }
      }
      ds[group] = sum(sums);
    }
  }
}

}  // namespace qft::QFT_ISA

// scale_grad: a weight gradient, reduced to one number per group against the levels.
#pragma once

#include "qft/cpu/companions.h"
#include "qft/cpu/decoder.h"
#include "qft/launch.h"

namespace qft::QFT_ISA {

// A row's gradient by group, written as each group ends.
template <class F>
struct GroupSums {
  const Decoder<F>& decoder;
  const Grouping& grouping;
  const uint8_t* codes;
  const float* zeros;  // or null
  float* ds;
  int64_t group = 0;
  Vec sums = zero();

  // adds block b, the gradient of whose `vectors` vectors dw(i) gives
  template <class Gradient>
  inline __attribute__((always_inline)) void add(int64_t b, int vectors, Gradient dw) {
    uint8_t copy[Decoder<F>::block_bytes];
    const uint8_t* p = decoder.block(codes, b, copy);
    const auto words = Decoder<F>::words(p);
#pragma GCC unroll kUnroll
    for (int i = 0; i < 8; i++) {
      if (i >= vectors) break;  // what follows is in no group
      const int64_t now = grouping.of_sub(b, i / 2);
      if (i % 2 == 0 && now != group) end_with(now);
      Vec level = decoder.levels_in_order(p, words, i);
      if (F::kind == Levels::integer && zeros) level = sub(level, broadcast(zeros[now]));
      sums = fma(level, dw(i), sums);
    }
  }

  void end_with(int64_t next) {
    ds[group] = sum(sums);
    sums = zero();
    group = next;
  }
};

template <class F>
static void scale_grad(const ScaleGradArgs& a) {
  const Weight& w = a.weight;
  const Decoder<F> decoder(w);
  const Grouping grouping(w);
  const Companion zeros = Companion::zeros(w, grouping);
  const int64_t whole = w.in / kBlock, columns = w.in - whole * kBlock;
#pragma omp parallel num_threads(a.place.threads)
  {
    Scratch zero_row(zeros.row_floats());
#pragma omp for schedule(static)
    for (int64_t o = a.row0; o < a.row1; o++) {
      const int64_t at = (o - a.row0) * w.in;
      const float* zero_points = nullptr;
      if constexpr (F::kind == Levels::integer) zero_points = zeros.row(o, 0, blocks(w.in), zero_row.data);
      GroupSums<F> row{decoder, grouping, decoder.row(o), zero_points, a.ds + (o - a.row0) * w.groups};
      for (int64_t b = 0; b < whole; b++)
        row.add(b, 8, [&](int i) { return load_as(a.dw, at + b * kBlock + 16 * i, a.dtype); });
      if (columns) {
        float cut[kBlock];  // the gradient under a last block that is cut short, zeros after it
        read_run(a.dw, at + whole * kBlock, columns, a.dtype, cut, kBlock);
        row.add(whole, static_cast<int>((columns + 15) / 16), [&](int i) { return load(cut + 16 * i); });
      }
      row.end_with(0);
    }
  }
}

}  // namespace qft::QFT_ISA

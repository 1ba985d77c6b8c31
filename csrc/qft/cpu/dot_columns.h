// dot_columns: two matrices multiplied number by number and summed down each column.
#pragma once

#include "qft/cpu/arrays.h"
#include "qft/launch.h"

namespace qft::QFT_ISA {

// Columns a thread sums at a time: a row's share is then two cache lines of 16-bit numbers.
constexpr int64_t kDotColumns = 64;

static void dot_columns(const DotColumnsArgs& a) {
#pragma omp parallel for schedule(static) num_threads(a.place.threads)
  for (int64_t first = 0; first < a.columns; first += kDotColumns) {
    const int64_t count = least(kDotColumns, a.columns - first), whole = count / 16;
    Vec sums[kDotColumns / 16];
    float tail[16] = {};
    for (int64_t v = 0; v < whole; v++) sums[v] = zero();
    for (int64_t row = 0; row < a.rows; row++) {
      const int64_t at = row * a.columns + first;
      for (int64_t v = 0; v < whole; v++)
        sums[v] = fma(load_as(a.a, at + 16 * v, a.dtype), load_as(a.b, at + 16 * v, a.dtype), sums[v]);
      for (int64_t i = 16 * whole; i < count; i++)
        tail[i % 16] += read(a.a, at + i, a.dtype) * read(a.b, at + i, a.dtype);
    }
    for (int64_t v = 0; v < whole; v++) store(a.total + first + 16 * v, sums[v]);
    for (int64_t i = 16 * whole; i < count; i++) a.total[first + i] = tail[i % 16];
  }
}

static int64_t dot_columns_workspace(int64_t, int64_t, int) { return 0; }

}  // namespace qft::QFT_ISA

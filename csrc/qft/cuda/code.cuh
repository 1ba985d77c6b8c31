// What CUDA kernels are compiled for: the width and kind of a code. Levels, group size and scale kind are run-time
// data: a table lookup takes as long whatever the table holds, so every codebook of a width shares one kernel.
#pragma once

#include "qft/decode.h"

namespace qft::QFT_ISA {

template <Levels kind_, int bits_>
struct Code {
  static constexpr Levels kind = kind_;
  static constexpr int bits = bits_;
  static constexpr bool may_have_zeros = kind_ == Levels::integer;
  static constexpr int levels = bits_ < 8 ? 1 << bits_ : 1;  // 8-bit integers are computed, not looked up
};

// Levels by code, as a kernel's argument: no device memory to own, and safe in a captured graph.
struct LevelTable {
  float level[16];
};

// On the host. Integers with zero points count from 0, those without from -2^(bits - 1).
template <class F>
LevelTable level_table(const Weight& w) {
  LevelTable table = {};
  if constexpr (F::bits < 8) {
    constexpr Codebook with_sign = integer_codebook<F::bits>(false), from_zero = integer_codebook<F::bits>(true);
    const float* levels = F::kind == Levels::codebook ? w.levels : w.zeros ? from_zero.levels : with_sign.levels;
    for (int code = 0; code < F::levels; code++) table.level[code] = levels[code];
  }
  return table;
}

}  // namespace qft::QFT_ISA

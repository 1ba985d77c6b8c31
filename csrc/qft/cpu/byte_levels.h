// Levels for products by a way of an instruction set's own, better than the decoder's: none, unless the set specializes
// this for a kind and a width.
#pragma once

#include "qft/decode.h"

namespace qft::QFT_ISA {

template <Levels kind, int bits>
struct ByteLevels {
  static constexpr bool used = false;
  static constexpr float unit = 1;
  static constexpr int column(int v, int l) { return code_at(v, l); }
  ByteLevels(const float*, bool) {}
};

}  // namespace qft::QFT_ISA

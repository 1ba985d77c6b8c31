// What the verbs ask of a format's codes: name, width, kind, and its codebook. The compiler emits one
// `CompiledCodebook` per codebook it is given; integers need no numbers of their own; `AnyCodebook` reads its levels at
// run time.
#pragma once

#include "qft/decode.h"

namespace qft::QFT_ISA {

template <int width>
struct Integer {
  static constexpr Levels kind = Levels::integer;
  static constexpr int bits = width;
  static constexpr Codebook with_sign = integer_codebook<width>(false), from_zero = integer_codebook<width>(true);

  static const float* codebook(const float*, bool zero) { return zero ? from_zero.levels : with_sign.levels; }
  static Codebook book(const float*, int, bool) {
    Codebook book;
    book.anchor = -static_cast<float>(1 << (width - 1));
    book.signed_scale = true;
    return book;
  }
};

// Emitted: bits, count, values
template <class Emitted>
struct CompiledCodebook {
  static constexpr Levels kind = Levels::codebook;
  static const float* codebook(const float*, bool) { return compiled().levels; }
  static const Codebook& book(const float*, int, bool) { return compiled(); }

 private:
  static const Codebook& compiled() {
    static constexpr Codebook book = make_codebook(Emitted::values, Emitted::count);
    return book;
  }
};

template <int width>
struct AnyCodebook {
  static constexpr Levels kind = Levels::codebook;
  static constexpr int bits = width;
  static const float* codebook(const float* levels, bool) { return levels; }
  static Codebook book(const float* levels, int count, bool) { return make_codebook(levels, count); }
};

}  // namespace qft::QFT_ISA

// A scale search: of several factors on a group's absmax scale, the one of least squared error. Every candidate is
// taken as it will be stored, and its error is summed in the same order on every instruction set.
#pragma once

#include "qft/cpu/arrays.h"
#include "qft/decode.h"
#include "qft/launch.h"

namespace qft::QFT_ISA {

static inline float abs(float a) { return a < 0 ? -a : a; }

// fp32 value of a scale or zero point as it will be stored
static inline float as_stored(float value, Dtype dtype) {
  return dtype == Dtype::f32 ? value : dtype == Dtype::bf16 ? from_bf16(to_bf16(value)) : from_f16(to_f16(value));
}

// The dtype that scales are written in; under dq the caller quantizes them again.
static inline Dtype scale_dtype(const QuantizeArgs& a) {
  return a.scale_kind == Scale::dq ? Dtype::f32 : static_cast<Dtype>(a.scale_kind);
}

// The smallest scale whose reciprocal is finite and normal; a group below it is a group of zeros.
constexpr float kSmallestScale = 1.17549435e-38f;

template <class F>
static constexpr float lowest_integer(bool zero) {
  return zero ? 0 : -static_cast<float>(1 << (F::bits - 1));
}

// Levels from `low` on, counted with the zero point, of weights divided by their scale.
template <class F>
static inline Vec nearest_integer(Vec scaled, Vec zero_point, Vec low) {
  const Vec high = add(low, broadcast(static_cast<float>((1 << F::bits) - 1)));
  return max(min(add(round(scaled), zero_point), high), low);
}

// A thread's search.
template <class F>
class ScaleSearch {
 public:
  ScaleSearch(const QuantizeArgs& a, const Codebook& book)
      : a_(a),
        book_(book),
        by_rank_(book.ascending),
        scales_(padded(a)),
        inverses_(padded(a)),
        factors_(padded(a)),
        columns_(a.factors ? blocks(a.in) * kBlock : 0) {
    if (!a.factors) return;
    for (int64_t c = 0; c < padded(a); c++) factors_.data[c] = c < a.factor_count ? a.factors[c] : 0;
    for (int64_t j = 0; j < blocks(a.in) * kBlock; j++)
      columns_.data[j] = j >= a.in ? 0 : a.importance ? a.importance[j] : 1;
  }

  // The best scale for columns first .. last - 1 of a row, given the absmax scale before it is rounded; 0 where that
  // one is 0 or overflows.
  float best(const float* row, int64_t first, int64_t last, float absmax_scale, float zero_point) const {
    set_candidates(absmax_scale);
    float best = scales_.data[0], least;
    if (abs(best) < kSmallestScale || abs(best) == kInfinity) return 0;
    errors<1>(row, first, last, 0, zero_point, &least);
    const auto compare = [&](int c, float error) {
      if (error < least && abs(scales_.data[c]) >= kSmallestScale) {
        least = error;
        best = scales_.data[c];
      }
    };
    int c = 1;
    for (; c + kCandidates <= a_.factor_count; c += kCandidates) {
      float error[kCandidates];
      errors<kCandidates>(row, first, last, c, zero_point, error);
      for (int i = 0; i < kCandidates; i++) compare(c + i, error[i]);
    }
    for (; c < a_.factor_count; c++) {
      float error;
      errors<1>(row, first, last, c, zero_point, &error);
      compare(c, error);
    }
    return best;
  }

 private:
  const QuantizeArgs& a_;
  const Codebook& book_;
  Table<(F::bits < 8 ? F::bits : 4)> by_rank_;
  Scratch scales_, inverses_, factors_;  // by candidate
  Scratch columns_;                      // what a column's error counts: 0 past the row's end

  static int64_t padded(const QuantizeArgs& a) { return (a.factor_count + 15) / 16 * 16; }

  void set_candidates(float absmax_scale) const {
    for (int c = 0; c < a_.factor_count; c += 16) {
      const Vec scale = as_stored(mul(broadcast(absmax_scale), load(factors_.data + c)), scale_dtype(a_));
      store(scales_.data + c, scale);
      store(inverses_.data + c, div(broadcast(1), scale));
    }
  }

  // Of `count` candidates from c on; what overflows comes out infinite or NaN.
  template <int count>
  void errors(const float* row, int64_t first, int64_t last, int c, float zero_point, float* error) const {
    if (a_.importance || (last - first) % 16)
      errors<count, true>(row, first, last, c, zero_point, error);
    else
      errors<count, false>(row, first, last, c, zero_point, error);
  }

  template <int count, bool weighted>
  void errors(const float* row, int64_t first, int64_t last, int c, float zero_point, float* error) const {
    const Vec low = broadcast(lowest_integer<F>(a_.zero)), shift = broadcast(zero_point);
    Vec scale[count], inverse[count], total[count];
    for (int i = 0; i < count; i++) {
      scale[i] = broadcast(scales_.data[c + i]);
      inverse[i] = broadcast(inverses_.data[c + i]);
      total[i] = QFT_ISA::zero();
    }
    for (int64_t j = first; j < last; j += 16) {
      const Vec weight = load(row + j);
      for (int i = 0; i < count; i++) {
        const Vec scaled = mul(weight, inverse[i]);
        Vec level;
        if constexpr (F::kind == Levels::integer)
          level = sub(nearest_integer<F>(scaled, shift, low), shift);
        else
          level = by_rank_[rank<F::bits>(scaled, book_.midpoints)];
        const Vec off = sub(weight, mul(level, scale[i]));
        Vec square = mul(off, off);
        if constexpr (weighted) square = mul(square, load(columns_.data + j));
        total[i] = add(total[i], square);
      }
    }
    for (int i = 0; i < count; i++) error[i] = sum(total[i]);
  }
};

}  // namespace qft::QFT_ISA

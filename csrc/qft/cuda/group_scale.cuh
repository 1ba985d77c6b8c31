// The scale of a group: from its bounds, or the best of several by squared error.
#pragma once

#include "qft/cuda/groups.cuh"
#include "qft/cuda/nearest.cuh"
#include "qft/cuda/octets.cuh"
#include "qft/cuda/vectors.cuh"

namespace qft::QFT_ISA {

// The smallest scale whose reciprocal is finite and normal; a group below it is a group of zeros.
constexpr float kSmallestNormal = 1.17549435e-38f;

// What codes of a group are computed from; `scale` as it will be stored.
struct GroupScale {
  float scale, inverse, zero_point;
};

// fp32 value of a scale or zero point as it will be stored
__device__ __forceinline__ float as_stored(float value, Dtype dtype) {
  return dtype == Dtype::f32    ? value
         : dtype == Dtype::bf16 ? to_float(from_float<__nv_bfloat16>(value))
                                : to_float(from_float<__half>(value));
}

// The dtype that scales are written in; under dq the caller quantizes them again.
__device__ __forceinline__ Dtype scale_dtype(const QuantizeArgs& a) {
  return a.scale_kind == Scale::dq ? Dtype::f32 : static_cast<Dtype>(a.scale_kind);
}

// Before it is rounded, from the bounds of a group, 0 included.
template <class F>
__device__ __forceinline__ float absmax_scale(const QuantizeArgs& a, const Codebook& book, float low, float high) {
  const float extreme = high > -low ? high : low;  // of largest magnitude; on a tie the negative one
  return a.zero              ? (high - low) / static_cast<float>((1 << F::bits) - 1)
         : book.signed_scale ? extreme / book.anchor
                             : fabsf(extreme) / fabsf(book.anchor);
}

// Of a scale before it is rounded, and the group's lower bound.
template <class F>
__device__ __forceinline__ GroupScale round_scale(const QuantizeArgs& a, float exact, float low) {
  const float scale = as_stored(exact, scale_dtype(a));
  const bool empty = fabsf(scale) < kSmallestNormal;
  GroupScale group = {empty ? 0 : scale, empty ? 0 : 1 / scale, 0};
  if (a.zero) group.zero_point = fminf(rintf(-low * group.inverse), static_cast<float>((1 << F::bits) - 1));
  return group;
}

// Sum of the squared errors of a record's first `left` weights, column by column; `importance` of the first, or null.
template <class F>
__device__ __forceinline__ float error_of(const float (&weights)[kRecord], int left, GroupScale group, bool zero,
                                          const float* importance, const Codebook& book, const Ranks& ranks) {
  float error = 0;
  for (int k = 0; k < kRecord; k++) {
    const float scaled = weights[k] * group.inverse;
    float level;
    if constexpr (F::kind == Levels::integer)
      level = round_to_level<F>(scaled, group.zero_point, zero) - group.zero_point;
    else
      level = ranks.levels[rank_of<F>(scaled, book, ranks)];
    const float off = weights[k] - level * group.scale;
    if (k < left) error += importance ? off * off * importance[k] : off * off;
  }
  return error;
}

// The best of the candidates; `exact` is the absmax scale before and `absmax` after it was rounded. A group whose scale
// is 0 or overflows keeps it. All lanes of the warp take part.
template <class F, class T>
__device__ __forceinline__ GroupScale search_scale(const QuantizeArgs& a, const GroupLanes& lanes,
                                                   const GroupLane& group, const T* row, bool aligned,
                                                   float (&weights)[kRecord], float exact, GroupScale absmax,
                                                   const Codebook& book, const Ranks& ranks) {
  const bool again = group.last - group.first > lanes.pass();  // only the last pass is still at hand
  GroupScale best = absmax;
  float least = 0;
#pragma unroll 1
  for (int c = 0; c < a.factor_count; c++) {
    GroupScale candidate = absmax;
    candidate.scale = as_stored(exact * a.factors[c], scale_dtype(a));
    candidate.inverse = 1 / candidate.scale;
    float error = 0;
#pragma unroll 1
    for (int64_t column = group.first + group.lane * kRecord; column < group.last; column += lanes.pass()) {
      const int64_t left = group.last - column;
      if (again) load_run(row + column, left, aligned, weights);
      error += error_of<F>(weights, static_cast<int>(left < kRecord ? left : kRecord), candidate, a.zero,
                           a.importance ? a.importance + column : nullptr, book, ranks);
    }
    across_group(lanes, [&](int distance) { error += __shfl_xor_sync(kAllLanes, error, distance); });
    if (c == 0 || (error < least && fabsf(candidate.scale) >= kSmallestNormal)) {
      least = error;
      best = candidate;
    }
  }
  const bool usable = absmax.scale != 0 && fabsf(absmax.scale) != kInfinity;
  return usable ? best : absmax;
}

}  // namespace qft::QFT_ISA

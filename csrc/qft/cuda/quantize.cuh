// quantize: the bounds of each group, its scale, its codes, by the same steps in the same order as on the CPU.
#pragma once

#include <cstdint>

#include "qft/cuda/code.cuh"
#include "qft/cuda/groups.cuh"
#include "qft/cuda/pack.cuh"
#include "qft/cuda/vectors.cuh"
#include "qft/cuda/warps.cuh"

namespace qft::QFT_ISA {

// The smallest scale whose reciprocal is finite and normal; a group below it is a group of zeros.
constexpr float kSmallestNormal = 1.17549435e-38f;

// What codes of a group are computed from.
struct GroupScale {
  float inverse, zero_point;
};

// From ranks among the levels to codes, and the midpoints that decide ranks.
struct Ranks {
  float midpoints[16];
  uint32_t code_of_rank[16];
};

__device__ __forceinline__ void fill_ranks(Ranks& ranks, const Codebook& book) {
  for (unsigned rank = 0; rank < 16; rank++)  // no index by a register: it would put a copy on the stack
    if (threadIdx.x == rank) {
      ranks.midpoints[rank] = book.midpoints[rank];
      ranks.code_of_rank[rank] = book.code_of_rank[rank];
    }
  __syncthreads();
}

// fp32 value of a scale or zero point as it will be stored
__device__ __forceinline__ float as_stored(float value, Dtype dtype) {
  return dtype == Dtype::f32    ? value
         : dtype == Dtype::bf16 ? to_float(from_float<__nv_bfloat16>(value))
                                : to_float(from_float<__half>(value));
}

// Keeps the least flat index of a weight that is not finite, whatever the order threads find them in.
__device__ __forceinline__ void note_not_finite(const float (&weights)[kRecord], int64_t index, int64_t* bad) {
  float probe = 0;  // NaN once a weight was not finite
  for (int k = 0; k < kRecord; k++) probe = fmaf(weights[k], 0.0f, probe);
  if (probe == 0) return;
  int first = 0;
  for (int k = kRecord - 1; k >= 0; k--)
    if ((__float_as_uint(weights[k]) & 0x7f800000u) == 0x7f800000u) first = k;
  atomicMin(reinterpret_cast<unsigned long long*>(bad), static_cast<unsigned long long>(index + first));
}

// From the bounds of a group, 0 included; its first lane writes the scale and zero point.
template <class F>
__device__ __forceinline__ GroupScale set_scale(const QuantizeArgs& a, const Codebook& book, int64_t at, bool leads,
                                                float low, float high) {
  constexpr float top = static_cast<float>((1 << F::bits) - 1);
  const Dtype stored = a.scale_kind == Scale::dq ? Dtype::f32 : static_cast<Dtype>(a.scale_kind);
  const float extreme = high > -low ? high : low;  // of largest magnitude; on a tie the negative one
  const float exact = a.zero              ? (high - low) / top
                      : book.signed_scale ? extreme / book.anchor
                                          : fabsf(extreme) / fabsf(book.anchor);
  const float scale = as_stored(exact, stored);
  const bool empty = fabsf(scale) < kSmallestNormal;
  GroupScale group = {empty ? 0 : 1 / scale, 0};
  if (a.zero) group.zero_point = fminf(rintf(-low * group.inverse), top);
  if (leads) {
    write(a.scales, at, empty ? 0 : scale, stored);
    if (a.zero) write(a.zeros, at, group.zero_point, a.zero_kind);
  }
  return group;
}

// Nearest integer, ties to even, in two additions; exact below 2^22, and what is larger stays so.
__device__ __forceinline__ float round_to_even(float a) { return (a + 0x1.8p23f) - 0x1.8p23f; }

// Integer code of a weight divided by its scale.
template <class F>
__device__ __forceinline__ uint32_t round_to_code(float scaled, float zero_point, bool zero) {
  const float low = zero ? 0 : -static_cast<float>(1 << (F::bits - 1)),
              high = low + static_cast<float>((1 << F::bits) - 1);
  const float level = fmaxf(fminf(round_to_even(scaled) + zero_point, high), low);
  return __float_as_uint(level + (0x1p23f - low)) & 0xffu;  // an integer added to 2^23 is the low bits of the sum
}

// Rank among the levels of a weight divided by its scale, ties going to the lower one: a binary search whose first two
// steps find their midpoints among the kernel's arguments.
template <class F>
__device__ __forceinline__ uint32_t rank_of(float scaled, const Codebook& book, const Ranks& ranks) {
  constexpr int half = F::levels / 2, quarter = F::levels / 4;
  const bool upper = book.midpoints[half - 1] < scaled;
  uint32_t rank = upper ? half : 0;
  if constexpr (quarter > 0) {
    if ((upper ? book.midpoints[half + quarter - 1] : book.midpoints[quarter - 1]) < scaled) rank += quarter;
    for (int step = quarter / 2; step > 0; step /= 2)
      if (ranks.midpoints[rank + step - 1] < scaled) rank += step;
  }
  return rank;
}

// The codes of a record of weights; `in_order`: ranks are codes.
template <class F>
__device__ __forceinline__ Record<F::bits> encode(const float (&weights)[kRecord], GroupScale scale, bool zero,
                                                  const Codebook& book, bool in_order, const Ranks& ranks) {
  Record<F::bits> record;
  for (int k = 0; k < kRecord; k++) {
    const float scaled = weights[k] * scale.inverse;
    if constexpr (F::kind == Levels::integer)
      record.set(k, round_to_code<F>(scaled, scale.zero_point, zero));
    else
      record.set(k, rank_of<F>(scaled, book, ranks));
  }
  if constexpr (F::kind == Levels::codebook)
    if (!in_order)
      for (uint32_t& word : record.words)
        for (int k = 0; k < 8; k++) {
          const uint32_t rank = word & 15;  // the lowest nibble leaves, its code comes in at the top
          word = word >> 4 | ranks.code_of_rank[rank] << 28;
        }
  return record;
}

// A lane takes a record of 32 codes at a time, so that what a group costs beside its codes is spread over many. Its
// loads lie 64 or 128 bytes from its neighbours'; L1 keeps the sectors until all of them are used. Counted, not
// measured.
template <class F, class T>
__global__ void __launch_bounds__(kThreads, 2)  // up to 128 registers: with 80 some spill
    quantize_kernel(QuantizeArgs a, const T* weight, Codebook book, bool in_order, GroupLanes lanes, bool aligned) {
  __shared__ Ranks ranks;
  if constexpr (F::kind == Levels::codebook) fill_ranks(ranks, book);

  for (Walk at(lanes.parts()); at.row < a.out; at.next()) {
    const GroupLane group(lanes, at.part, a.in);
    const T* row = weight + at.row * a.in;
    const int64_t first = group.first + group.lane * kRecord;

    float weights[kRecord], low = 0, high = 0;
    for (int64_t column = first; column < group.last; column += lanes.pass()) {
      load_run(row + column, group.last - column, aligned, weights);
      note_not_finite(weights, at.row * a.in + column, a.bad);
      for (int k = 0; k < kRecord; k++) {
        low = fminf(low, weights[k]);
        high = fmaxf(high, weights[k]);
      }
    }
    across_group(lanes, [&](int distance) {
      low = fminf(low, __shfl_xor_sync(kAllLanes, low, distance));
      high = fmaxf(high, __shfl_xor_sync(kAllLanes, high, distance));
    });
    const GroupScale scale = set_scale<F>(a, book, at.row * a.groups + group.group, group.leads, low, high);

    const bool again = group.last - group.first > lanes.pass();  // only the last pass is still at hand
    for (int64_t column = first; column < group.last; column += lanes.pass()) {
      const int64_t left = group.last - column;
      if (again) load_run(row + column, left, aligned, weights);
      Record<F::bits> record = encode<F>(weights, scale, a.zero, book, in_order, ranks);
      record.cut(left);
      store_record(a.codes + at.row * a.row_bytes, column / kRecord, record, column + kRecord >= a.in, a.row_bytes);
    }
  }
}

static __global__ void clear_bad_kernel(int64_t* bad) { *bad = INT64_MAX; }

template <class F>
Codebook codebook_of(const QuantizeArgs& a) {
  if constexpr (F::kind == Levels::codebook) return make_codebook(a.levels, a.count);
  Codebook book;
  book.anchor = -static_cast<float>(1 << (F::bits - 1));
  book.signed_scale = true;
  return book;
}

inline bool codes_ascend(const Codebook& book) {
  for (int rank = 0; rank < 16; rank++)
    if (book.midpoints[rank] != kInfinity && book.code_of_rank[rank + 1] != rank + 1) return false;
  return book.code_of_rank[0] == 0;
}

template <class F>
void quantize(const QuantizeArgs& a) {
  launch(a.place, clear_bad_kernel, dim3(1), 1, 0, a.bad);
  const GroupLanes lanes(a.group, a.groups, kRecord);
  const Codebook book = codebook_of<F>(a);
  if (a.out <= 0 || a.groups <= 0) return;
  with_type(a.dtype, [&](auto number) {
    using T = decltype(number);
    const T* weight = static_cast<const T*>(a.weight);
    launch(a.place, quantize_kernel<F, T>, grid_for(a.out, lanes.parts(), a.place.device), kThreads, 0, a, weight, book,
           codes_ascend(book), lanes, rows_aligned(weight, a.in));
  });
}

}  // namespace qft::QFT_ISA

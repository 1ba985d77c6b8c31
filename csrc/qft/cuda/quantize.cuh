// quantize: the bounds of each group, its scale, its codes, by the same steps in the same order as on the CPU; but the
// errors of a scale search are summed in the order of the lanes.
#pragma once

#include <cstdint>

#include "qft/cuda/group_scale.cuh"
#include "qft/cuda/pack.cuh"

namespace qft::QFT_ISA {

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

// The codes of a record of weights; `in_order`: ranks are codes.
template <class F>
__device__ __forceinline__ Record<F::bits> encode(const float (&weights)[kRecord], GroupScale scale, bool zero,
                                                  const Codebook& book, bool in_order, const Ranks& ranks) {
  Record<F::bits> record;
  for (int k = 0; k < kRecord; k++) {
    const float scaled = weights[k] * scale.inverse;
    if constexpr (F::kind == Levels::integer)
      record.set(k, code_of<F>(round_to_level<F>(scaled, scale.zero_point, zero), zero));
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
template <class F, class T, bool search>
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
    const float exact = absmax_scale<F>(a, book, low, high);
    GroupScale scale = round_scale<F>(a, exact, low);
    if constexpr (search) scale = search_scale<F>(a, lanes, group, row, aligned, weights, exact, scale, book, ranks);
    if (group.leads) {
      write(a.scales, at.row * a.groups + group.group, scale.scale, scale_dtype(a));
      if (a.zero) write(a.zeros, at.row * a.groups + group.group, scale.zero_point, a.zero_kind);
    }

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
    launch(a.place, a.factors ? quantize_kernel<F, T, true> : quantize_kernel<F, T, false>,
           grid_for(a.out, lanes.parts(), a.place.device), kThreads, 0, a, weight, book, codes_ascend(book), lanes,
           rows_aligned(weight, a.in));
  });
}

}  // namespace qft::QFT_ISA

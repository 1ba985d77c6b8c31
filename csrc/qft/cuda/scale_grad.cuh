// scale_grad: a weight gradient, reduced to one number per group against the levels.
#pragma once

#include "qft/cuda/groups.cuh"
#include "qft/cuda/levels.cuh"
#include "qft/cuda/vectors.cuh"
#include "qft/cuda/warps.cuh"

namespace qft::QFT_ISA {

// Each lane sums its own columns in ascending order, then the lanes of a group are added pairwise: the order depends on
// the group's size alone.
template <class F, class T>
__global__ void __launch_bounds__(kThreads)
    scale_grad_kernel(Weight w, LevelTable levels, GroupLanes lanes, int64_t row0, int64_t rows, const T* dw,
                      bool aligned, float* ds) {
  __shared__ SharedTables tables;
  fill_tables(tables, levels, w);

  for (Walk at(lanes.parts()); at.row < rows; at.next()) {
    const int64_t o = row0 + at.row;
    const uint8_t* row = w.codes + o * w.row_bytes;
    const T* gradient = dw + at.row * w.in;
    const GroupLane group(lanes, at.part, w.in);
    const float zero = group.first < group.last ? zero_of<F>(w, o, group.group) : 0.0f;

    const int64_t first = group.first + group.lane * kOctet;
    OctetPlace place = place_of<F::bits>(row, first);

    float sum = 0;
    for (int64_t column = first; column < group.last; column += lanes.pass()) {
      const Octet<F::bits> codes = load_octet<F::bits>(place);
      float level[kOctet], gradients[kOctet];
      load_run(gradient + column, group.last - column, aligned, gradients);  // 0 past the row's end
      decode<F>(codes, place.octet, 0, w, tables, level);
      for (int k = 0; k < kOctet; k++) sum = fmaf(level[k] - zero, gradients[k], sum);
      place.record += lanes.lanes() * F::bits;  // lanes of a group come in fours, a record each
    }

    across_group(lanes, [&](int distance) { sum += __shfl_xor_sync(kAllLanes, sum, distance); });
    if (group.leads) ds[at.row * w.groups + group.group] = sum;
  }
}

template <class F>
void scale_grad(const ScaleGradArgs& a) {
  const Weight& w = a.weight;
  const int64_t rows = a.row1 - a.row0;
  const GroupLanes lanes(w.group, w.groups, kOctet);
  if (rows <= 0 || w.groups <= 0) return;
  with_type(a.dtype, [&](auto number) {
    using T = decltype(number);
    const T* dw = static_cast<const T*>(a.dw);
    launch(a.place, scale_grad_kernel<F, T>, grid_for(rows, lanes.parts(), a.place.device), kThreads, 0, w,
           level_table<F>(w), lanes, a.row0, rows, dw, rows_aligned(dw, w.in), a.ds);
  });
}

}  // namespace qft::QFT_ISA

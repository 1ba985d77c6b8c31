// zero_scale_grad: the gradient of scales that are 0. Their outputs are 0 and say nothing, so the sum is taken in full.
#pragma once

#include "qft/cuda/levels.cuh"
#include "qft/cuda/vectors.cuh"
#include "qft/cuda/warps.cuh"

namespace qft::QFT_ISA {

// One block an output. Nearly all end at once: a scale of 0 stands for a row of zeros.
template <class F, class T>
__global__ void __launch_bounds__(kThreads) zero_scale_grad_kernel(Weight w, LevelTable levels, const T* dy, const T* x,
                                                                   int64_t rows, bool aligned, float* ds) {
  __shared__ SharedTables tables;
  __shared__ float by_thread[kThreads];
  fill_tables(tables, levels, w);
  const int64_t o = blockIdx.x;
  const bool wanted = scale_at(w, tables.dynamic_map, o, 0) == 0;
  const float zero = zero_of<F>(w, o, 0);

  float sum = 0;
  for (int64_t column = int64_t{threadIdx.x} * kOctet; wanted && column < w.in; column += kThreads * kOctet) {
    const OctetPlace place = place_of<F::bits>(w.codes + o * w.row_bytes, column);
    float level[kOctet], gradient[kOctet] = {};
    decode<F>(load_octet<F::bits>(place), place.octet, 0, w, tables, level);
    for (int64_t row = 0; row < rows; row++) {
      float input[kOctet];
      load_run(x + row * w.in + column, w.in - column, aligned, input);
      for (int k = 0; k < kOctet; k++) gradient[k] = fmaf(to_float(dy[row * w.out + o]), input[k], gradient[k]);
    }
    for (int k = 0; k < kOctet; k++) sum = fmaf(level[k] - zero, gradient[k], sum);
  }

  by_thread[threadIdx.x] = sum;
  __syncthreads();
  if (wanted && threadIdx.x == 0) {
    float total = 0;
    for (int i = 0; i < kThreads; i++) total += by_thread[i];
    ds[o] = total;
  }
}

template <class F>
void zero_scale_grad(const ZeroScaleGradArgs& a) {
  const Weight& w = a.weight;
  if (w.out <= 0) return;
  with_type(a.dtype, [&](auto number) {
    using T = decltype(number);
    const T *dy = static_cast<const T*>(a.dy), *x = static_cast<const T*>(a.x);
    launch(a.place, zero_scale_grad_kernel<F, T>, dim3(static_cast<unsigned>(w.out)), kThreads, 0, w, level_table<F>(w),
           dy, x, a.rows, rows_aligned(x, w.in), a.ds);
  });
}

}  // namespace qft::QFT_ISA

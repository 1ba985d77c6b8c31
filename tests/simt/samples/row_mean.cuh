// Mean of each row and how many numbers are positive, a block of 4 warps per row: static shared memory, shuffles,
// votes, an atomic.
#pragma once

#include <cuda_fp16.h>

constexpr int kWarps = 4;

__global__ void __launch_bounds__(32 * kWarps) row_mean(const __half* x,  // [rows, columns]
                                                        float* mean,      // [rows]
                                                        __half* centred,  // [rows, columns]: x - mean
                                                        int* positive,    // [1], counts up
                                                        int columns) {
  __shared__ float sums[kWarps];
  __shared__ float row_mean;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const __half* row = x + blockIdx.x * columns;

  float sum = 0;
  int count = 0;
  const int padded = (columns + 31) / 32 * 32;  // whole warps stay in the loop for the vote
  for (int i = thread; i < padded; i += 32 * kWarps) {
    const float value = i < columns ? __half2float(__ldg(row + i)) : 0.0f;
    sum += value;
    count += __popc(__ballot_sync(0xffffffffu, value > 0));
  }
  for (int distance = 16; distance; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  if (lane == 0) {
    sums[warp] = sum;
    atomicAdd(positive, count);
  }
  __syncthreads();
  if (warp == 0) {
    float total = lane < kWarps ? sums[lane] : 0.0f;
    for (int distance = kWarps / 2; distance; distance /= 2) total += __shfl_down_sync(0xffffffffu, total, distance);
    if (lane == 0) {
      row_mean = total / columns;
      mean[blockIdx.x] = total / columns;
    }
  }
  __syncthreads();
  for (int i = thread; i < columns; i += 32 * kWarps)
    centred[blockIdx.x * columns + i] = __float2half_rn(__half2float(row[i]) - row_mean);
}

inline bool run_row_mean(void* const* buffers, int columns) {
  constexpr int rows = 3;
  auto* x = static_cast<const __half*>(buffers[0]);
  auto* mean = static_cast<float*>(buffers[1]);
  auto* centred = static_cast<__half*>(buffers[2]);
  auto* positive = static_cast<int*>(buffers[3]);
  simt::add_buffer(x, rows * columns * 2, "x");
  simt::add_buffer(mean, rows * 4, "mean", simt::OUT);
  simt::add_buffer(centred, rows * columns * 2, "centred", simt::OUT);
  simt::add_buffer(positive, 4, "positive", simt::INOUT);
  return simt::launch(row_mean, rows, 32 * kWarps, 0, x, mean, centred, positive, columns);
}

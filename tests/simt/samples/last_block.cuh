// A sum over all blocks without a second launch: each writes its part, the last to count itself in adds them up.
#pragma once

#include <cuda_runtime.h>

__global__ void last_block(const float* x, float* parts, unsigned* arrived, float* sum, int n) {
  __shared__ bool last;
  float part = 0;
  for (int i = blockIdx.x * 32 + threadIdx.x; i < n; i += gridDim.x * 32) part += x[i];
  for (int distance = 16; distance; distance /= 2) part += __shfl_xor_sync(0xffffffffu, part, distance);
  if (threadIdx.x == 0) {
    parts[blockIdx.x] = part;
    __threadfence();
    last = atomicAdd(arrived, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last) return;
  float total = 0;
  for (unsigned i = threadIdx.x; i < gridDim.x; i += 32) total += parts[i];
  for (int distance = 16; distance; distance /= 2) total += __shfl_xor_sync(0xffffffffu, total, distance);
  if (threadIdx.x == 0) {
    *sum = total;
    *arrived = 0;
  }
}

inline bool run_last_block(void* const* buffers, int n) {
  constexpr int blocks = 5;
  auto* x = static_cast<const float*>(buffers[0]);
  auto* parts = static_cast<float*>(buffers[1]);
  auto* arrived = static_cast<unsigned*>(buffers[2]);
  auto* sum = static_cast<float*>(buffers[3]);
  simt::add_buffer(x, n * 4, "x");
  simt::add_buffer(parts, blocks * 4, "parts", simt::OUT);
  simt::add_buffer(arrived, 4, "arrived", simt::INOUT);
  simt::add_buffer(sum, 4, "sum", simt::OUT);
  return simt::launch(last_block, blocks, 32, 0, x, parts, arrived, sum, n);
}

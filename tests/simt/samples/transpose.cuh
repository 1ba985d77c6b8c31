// Each warp transposes 8x8 tiles in its own slice of dynamic shared memory: __syncwarp is enough, and needed twice.
#pragma once

#include <cuda_runtime.h>

__global__ void transpose(const float* in, float* out, int tiles) {  // [tiles, 8, 8] -> the same, transposed
  DYN_SMEM(memory, 16);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  float* tile = reinterpret_cast<float*>(memory) + warp * 64;
  for (int t = warp; t < tiles; t += warps) {
    const float2 pair = reinterpret_cast<const float2*>(in + t * 64)[lane];
    *reinterpret_cast<float2*>(tile + 2 * lane) = pair;
    __syncwarp();
    for (int half = 0; half < 2; half++) {
      const int i = half * 32 + lane;
      out[t * 64 + i] = tile[i % 8 * 8 + i / 8];
    }
    __syncwarp();
  }
}

inline bool run_transpose(void* const* buffers, int tiles) {
  auto* in = static_cast<const float*>(buffers[0]);
  auto* out = static_cast<float*>(buffers[1]);
  simt::add_buffer(in, tiles * 256, "in");
  simt::add_buffer(out, tiles * 256, "out", simt::OUT);
  return simt::launch(transpose, 1, 64, 2 * 256, in, out, tiles);
}

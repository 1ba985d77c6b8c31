// Counts bytes, 16 at a time, first in shared memory, then across blocks.
#pragma once

#include <cuda_runtime.h>

__global__ void histogram(const uint8_t* bytes, unsigned* counts, int n) {  // counts [256], n a multiple of 16
  __shared__ unsigned local[256];
  for (int i = threadIdx.x; i < 256; i += blockDim.x) local[i] = 0;
  __syncthreads();
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n / 16; i += gridDim.x * blockDim.x) {
    const uint4 chunk = reinterpret_cast<const uint4*>(bytes)[i];
    const unsigned words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
    for (unsigned word : words)
      for (int shift = 0; shift < 32; shift += 8) atomicAdd(&local[word >> shift & 255], 1u);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 256; i += blockDim.x) atomicAdd(&counts[i], local[i]);
}

inline bool run_histogram(void* const* buffers, int n) {
  auto* bytes = static_cast<const uint8_t*>(buffers[0]);
  auto* counts = static_cast<unsigned*>(buffers[1]);
  simt::add_buffer(bytes, n, "bytes");
  simt::add_buffer(counts, 1024, "counts", simt::INOUT);
  return simt::launch(histogram, 2, 64, 0, bytes, counts, n);
}

// Two warps produce, two consume, through one buffer and two named barriers: 1 says full, 2 says empty. A block writes
// rows of its own; each output is the number at the mirrored place plus 1.
#pragma once

#include <cuda_runtime.h>

__forceinline__ void bar_sync(int id, int threads, SIMT_SITE) { simt::barrier(site, id, threads); }

__global__ void handover(const int* in, int* out, int rounds) {  // [blocks, rounds, 64] both
  __shared__ int shared[64];
  const int lane = threadIdx.x % 64;
  const int* from = in + blockIdx.x * rounds * 64;
  int* to = out + blockIdx.x * rounds * 64;
  if (threadIdx.x < 64) {
    for (int r = 0; r < rounds; r++) {
      if (r > 0) bar_sync(2, 128);
      shared[lane] = from[r * 64 + lane];
      bar_sync(1, 128);
    }
  } else {
    for (int r = 0; r < rounds; r++) {
      bar_sync(1, 128);
      to[r * 64 + lane] = shared[63 - lane] + 1;
      if (r + 1 < rounds) bar_sync(2, 128);
    }
  }
}

inline bool run_handover(void* const* buffers, int rounds) {
  auto* in = static_cast<const int*>(buffers[0]);
  auto* out = static_cast<int*>(buffers[1]);
  simt::add_buffer(in, 2 * rounds * 256, "in");
  simt::add_buffer(out, 2 * rounds * 256, "out", simt::OUT);
  return simt::launch(handover, 2, 128, 0, in, out, rounds);
}

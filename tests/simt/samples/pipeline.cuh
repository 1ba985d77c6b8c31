// Sums 64-column tiles of a matrix, reversed within each tile so that threads read what others copied: a ring of three
// stages filled by cp.async, whose zero fill covers the ragged last tile.
#pragma once

#include <cuda_runtime.h>

constexpr int kTile = 64, kStages = 3, kThreads = 64;

// A project has these in one header, with asm for nvcc.
__forceinline__ void copy16(void* to, const void* from, unsigned bytes) {
  simt::cp_async(simt::smem_u32(to), from, 16, bytes);
}
__forceinline__ void commit() { simt::cp_commit(); }
template <int pending>
__forceinline__ void wait() {
  simt::cp_wait(pending);
}

__global__ void pipeline(const float* x,  // [n], n a multiple of 4
                         float* sums,     // [kTile]: sums[i] = sum over tiles of x[tile, kTile - 1 - i]
                         int n) {
  DYN_SMEM(memory, 16);
  auto* ring = reinterpret_cast<float (*)[kTile]>(memory);  // [kStages][kTile]
  const int thread = threadIdx.x, tiles = (n + kTile - 1) / kTile;

  auto load = [&](int tile) {
    if (tile < tiles && thread < kTile / 4) {
      const int at = tile * kTile + 4 * thread;
      copy16(&ring[tile % kStages][4 * thread], x + min(at, n - 4), at < n ? 16 : 0);
    }
    commit();
  };
  for (int stage = 0; stage < kStages - 1; stage++) load(stage);
  float sum = 0;
  for (int tile = 0; tile < tiles; tile++) {
    wait<kStages - 2>();
    __syncthreads();
    load(tile + kStages - 1);
    sum += ring[tile % kStages][kTile - 1 - thread];
  }
  sums[thread] = sum;
}

inline bool run_pipeline(void* const* buffers, int n) {
  auto* x = static_cast<const float*>(buffers[0]);
  auto* sums = static_cast<float*>(buffers[1]);
  simt::add_buffer(x, n * 4, "x");
  simt::add_buffer(sums, kTile * 4, "sums", simt::OUT);
  return simt::launch(pipeline, 1, kThreads, kStages * kTile * 4, x, sums, n);
}

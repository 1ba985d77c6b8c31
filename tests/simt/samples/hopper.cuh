// A warp-specialised matrix product for sm_90a over 4-bit weights: a producer warpgroup decodes them into a swizzled
// bf16 tile while TMA brings the activations, a consumer warpgroup multiplies with wgmma. Forward and backward read one
// copy of the codes: they differ in which tile they fetch and in the major order their descriptor names. It is here to
// try the emulator on every synchronisation such a kernel has, not to be fast.
#pragma once

#include "ptx90.cuh"

namespace ptx = qft::ptx;

constexpr int kTile = 64;                      // rows and columns of the result per block, and K per step
constexpr int kStages = 2;                     // tiles in the ring
constexpr int kGroup = 128;                    // threads of a warpgroup
constexpr int kTileBytes = kTile * kTile * 2;  // 64 rows of 128 bytes
constexpr int kSharedBytes = kStages * (2 * kTileBytes + 2 * 8);

// The matrix descriptor of a tile of 128-byte rows in 128-byte swizzle. Groups of eight rows follow each other; the
// tile is one swizzle span wide, so the leading offset is not used.
__device__ __forceinline__ uint64_t descriptor(uint32_t tile) {
  constexpr uint64_t row_group = 8 * 128, swizzle_128 = 1;
  return (tile & 0x3ffff) >> 4 | uint64_t{1} << 16 | row_group >> 4 << 32 | swizzle_128 << 62;
}

// Eight codes, first in the lowest bits, as the bf16 levels they stand for.
__device__ __forceinline__ uint4 decode(uint32_t codes, const uint16_t* levels) {
  uint32_t pairs[4];
  for (int i = 0; i < 4; i++)
    pairs[i] = levels[codes >> 8 * i & 15] | uint32_t(levels[codes >> (8 * i + 4) & 15]) << 16;
  return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

// One 64 x 64 tile of W[outs][ins] from (first_out, first_in), by 128 threads; zeros outside of W.
__device__ __forceinline__ void decode_tile(char* tile, const uint8_t* codes, const uint16_t* levels, int outs, int ins,
                                            int first_out, int first_in, int thread) {
  for (int i = thread; i < kTile * 8; i += kGroup) {
    const int row = i / 8, chunk = i % 8, out = first_out + row, in = first_in + 8 * chunk;
    uint4 values = make_uint4(0, 0, 0, 0);
    if (out < outs && in < ins)
      values = decode(*reinterpret_cast<const uint32_t*>(codes + (int64_t(out) * ins + in) / 2), levels);
    *reinterpret_cast<uint4*>(tile + row * 128 + (chunk ^ row % 8) * 16) = values;
  }
}

// Forward: y[m][outs] = x[m][ins] W^T. Backward: y[m][ins] = x[m][outs] W. `x_map` covers x in boxes of 64 x 64 bf16
// with 128-byte swizzle; codes is W[outs][ins], two to a byte, ins % 8 == 0; levels [16] bf16. Grid (ceil(columns of y
// / 64), ceil(m / 64)), 256 threads, kSharedBytes of shared memory.
template <bool backward>
__global__ void __launch_bounds__(2 * kGroup)
    dequantized_gemm(const __grid_constant__ CUtensorMap x_map, const uint8_t* codes, const uint16_t* levels, float* y,
                     int m, int outs, int ins) {
  DYN_SMEM(shared, 1024);
  char* const w_tiles = shared + kStages * kTileBytes;
  const uint32_t x_tile = ptx::smem_u32(shared), w_tile = x_tile + kStages * kTileBytes;
  const uint32_t full = w_tile + kStages * kTileBytes, empty = full + kStages * 8;  // one mbarrier per stage each
  const int row = blockIdx.y * kTile, column = blockIdx.x * kTile, columns = backward ? ins : outs;
  const int steps = ((backward ? outs : ins) + kTile - 1) / kTile, thread = threadIdx.x % kGroup;

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; stage++) {
      ptx::mbarrier_init(full + 8 * stage, kGroup);
      ptx::mbarrier_init(empty + 8 * stage, kGroup);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();

  if (threadIdx.x < kGroup) {
    for (int step = 0; step < steps; step++) {
      const int stage = step % kStages, round = step / kStages, k = step * kTile;
      ptx::mbarrier_wait(empty + 8 * stage, (round + 1) % 2);
      if (thread == 0) ptx::tma_load_2d(x_tile + stage * kTileBytes, &x_map, k, row, full + 8 * stage);
      decode_tile(w_tiles + stage * kTileBytes, codes, levels, outs, ins, backward ? k : column, backward ? column : k,
                  thread);
      ptx::fence_proxy_async();
      if (thread == 0)
        ptx::mbarrier_arrive_expect_tx(full + 8 * stage, kTileBytes);
      else
        ptx::mbarrier_arrive(full + 8 * stage);
    }
  } else {
    float sum[32];
    for (int step = 0; step < steps; step++) {
      const int stage = step % kStages, round = step / kStages;
      ptx::mbarrier_wait(full + 8 * stage, round % 2);
      const uint64_t x = descriptor(x_tile + stage * kTileBytes), w = descriptor(w_tile + stage * kTileBytes);
      ptx::wgmma_fence();
      for (int k = 0; k < 4; k++)  // 16 of K: 32 bytes along a row, or 16 rows
        ptx::wgmma_m64k16<0, backward>(sum, x + k * (32 >> 4), w + k * ((backward ? 16 * 128 : 32) >> 4), step + k > 0);
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      ptx::mbarrier_arrive(empty + 8 * stage);
    }
    for (int j = 0; j < 32; j++) {
      const int at_row = row + thread / 32 * 16 + thread % 32 / 4 + j / 2 % 2 * 8;
      const int at_column = column + j / 4 * 8 + thread % 4 * 2 + j % 2;
      if (at_row < m && at_column < columns) y[int64_t(at_row) * columns + at_column] = sum[j];
    }
  }
}

// A textbook matrix product for sm_80: a ring of tiles filled by cp.async, swizzled, read by ldmatrix, multiplied by
// mma.sync. It is here to try the emulator on every synchronisation such a kernel has, not to be fast.
#pragma once

#include "ptx_more.cuh"

namespace ptx = qft::ptx;

constexpr int kTile = 64;                       // rows and columns of C per block
constexpr int kDepth = 32;                      // K per step
constexpr int kThreads = 128;                   // 2 x 2 warps, 32 x 32 of C each
constexpr int kTileBytes = kTile * kDepth * 2;  // of A, and of B

// Where 16-byte chunk `chunk` of row `row` lies in a tile of `row_bytes` (64 or 128) a row. The XOR spreads one column
// of chunks over all 128-byte lines, so that the eight rows ldmatrix reads together hit different banks.
template <int row_bytes>
__device__ __forceinline__ uint32_t swizzled(int row, int chunk) {
  const int line = row * row_bytes / 128;
  return row * row_bytes + (chunk ^ line % (row_bytes / 16)) * 16;
}

// Starts the copy of one tile of `matrix` [rows][columns], from (first_row, first_column); zeros outside the matrix.
template <int tile_rows, int row_bytes>
__device__ __forceinline__ void load_tile(uint32_t tile, const __nv_bfloat16* matrix, int rows, int columns,
                                          int first_row, int first_column) {
  constexpr int chunks = row_bytes / 16;
  for (int i = threadIdx.x; i < tile_rows * chunks; i += kThreads) {
    const int row = first_row + i / chunks, column = first_column + i % chunks * 8;
    const bool inside = row < rows && column < columns;
    ptx::cp_async16(tile + swizzled<row_bytes>(i / chunks, i % chunks),
                    inside ? matrix + int64_t(row) * columns + column : matrix, inside ? 16 : 0);
  }
}

// sum[32 x 32 of the warp] += the products of one step. sum[i][j] is the mma tile at row 16i, column 8j.
template <bool b_by_k>
__device__ __forceinline__ void multiply(float (&sum)[2][4][4], uint32_t a_tile, uint32_t b_tile, int lane, int warp) {
  const int warp_row = warp / 2 * 32, warp_column = warp % 2 * 32;
  for (int k = 0; k < kDepth; k += 16) {
    uint32_t a[2][4], b[4][2];
    for (int i = 0; i < 2; i++) {
      const int row = warp_row + 16 * i + lane % 16, chunk = k / 8 + lane / 16;
      ptx::ldmatrix_x4<false>(a[i], a_tile + swizzled<64>(row, chunk));
    }
    for (int j = 0; j < 4; j += 2) {  // 16 columns: matrices (k, n), (k + 8, n), (k, n + 8), (k + 8, n + 8)
      const int column = warp_column + 8 * j;
      uint32_t pair[4];
      if constexpr (b_by_k)
        ptx::ldmatrix_x4<true>(pair, b_tile + swizzled<128>(k + lane % 16, column / 8 + lane / 16));
      else
        ptx::ldmatrix_x4<false>(pair, b_tile + swizzled<64>(column + lane / 16 * 8 + lane % 8, k / 8 + lane / 8 % 2));
      for (int half = 0; half < 2; half++) {
        b[j + half][0] = pair[2 * half];
        b[j + half][1] = pair[2 * half + 1];
      }
    }
    for (int i = 0; i < 2; i++)
      for (int j = 0; j < 4; j++) ptx::mma_m16n8k16<__nv_bfloat16>(sum[i][j], a[i], b[j]);
  }
}

// c[m][n] = a[m][k] * B, with b = B by columns [n][k], or by rows [k][n] (b_by_k). Rows of a and b start at multiples
// of 16 bytes: k % 8 == 0, and n % 8 == 0 where b_by_k. Grid (ceil(n / 64), ceil(m / 64)), 128 threads, stages * 8192
// bytes of shared memory.
template <int stages, bool b_by_k>
__global__ void __launch_bounds__(kThreads)
    gemm(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c, int m, int n, int k) {
  DYN_SMEM(shared, 128);
  const uint32_t a_tiles = ptx::smem_u32(shared), b_tiles = a_tiles + stages * kTileBytes;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = blockIdx.y * kTile, column = blockIdx.x * kTile, steps = (k + kDepth - 1) / kDepth;

  const auto load = [&](int step) {  // past the last step: an empty group, so that cp_wait counts steps
    if (step < steps) {
      const int at = step % stages * kTileBytes;
      load_tile<kTile, 64>(a_tiles + at, a, m, k, row, step * kDepth);
      if constexpr (b_by_k)
        load_tile<kDepth, 128>(b_tiles + at, b, k, n, step * kDepth, column);
      else
        load_tile<kTile, 64>(b_tiles + at, b, n, k, column, step * kDepth);
    }
    ptx::cp_commit();
  };

  float sum[2][4][4] = {};
  for (int step = 0; step < stages - 1; step++) load(step);
  for (int step = 0; step < steps; step++) {
    ptx::cp_wait<stages - 2>();
    __syncthreads();  // all copies of this step have landed, and all have left the stage that load() fills again
    load(step + stages - 1);
    const int at = step % stages * kTileBytes;
    multiply<b_by_k>(sum, a_tiles + at, b_tiles + at, lane, warp);
  }

  for (int i = 0; i < 2; i++)
    for (int j = 0; j < 4; j++)
      for (int v = 0; v < 4; v++) {
        const int at_row = row + warp / 2 * 32 + 16 * i + lane / 4 + v / 2 * 8;
        const int at_column = column + warp % 2 * 32 + 8 * j + lane % 4 * 2 + v % 2;
        if (at_row < m && at_column < n) c[int64_t(at_row) * n + at_column] = sum[i][j][v];
      }
}

// Kernels that only move bytes: straight through, in the row pattern of a matrix kernel, and as a dequantization.
#pragma once
#include "probe.h"
#include "ptx.cuh"

constexpr int MOVE_THREADS = 512;
constexpr int MOVE_VECTORS = 4;  // 16-byte accesses per thread and turn
constexpr int ROW_THREADS = 256;
constexpr int ROW_WARPS = ROW_THREADS / 32;

__device__ __forceinline__ uint32_t fold(uint4 v) { return v.x ^ v.y ^ v.z ^ v.w; }
__device__ __forceinline__ uint32_t fold(uint2 v) { return v.x ^ v.y; }

// Keeps a sum alive at the price of one comparison; whether a random sum ever matches does not matter.
__device__ __forceinline__ void keep(uint32_t sum, void* sink) {
  if (sum == 0x5eed5eedu) *static_cast<uint32_t*>(sink) = sum;
}

__global__ void __launch_bounds__(MOVE_THREADS) read_linear(const __grid_constant__ Linear args) {
  const uint4* source = static_cast<const uint4*>(args.source);
  const int64_t count = args.bytes / 16, stride = int64_t(gridDim.x) * MOVE_THREADS;
  uint32_t sum = 0;
  for (int64_t at = int64_t(blockIdx.x) * MOVE_THREADS + threadIdx.x; at < count; at += MOVE_VECTORS * stride) {
    uint4 loaded[MOVE_VECTORS] = {};
#pragma unroll
    for (int v = 0; v < MOVE_VECTORS; v++)
      if (at + v * stride < count) loaded[v] = source[at + v * stride];
#pragma unroll
    for (int v = 0; v < MOVE_VECTORS; v++) sum ^= fold(loaded[v]);
  }
  keep(sum, args.target);
}

__global__ void __launch_bounds__(MOVE_THREADS) write_linear(const __grid_constant__ Linear args) {
  uint4* target = static_cast<uint4*>(args.target);
  const int64_t count = args.bytes / 16, stride = int64_t(gridDim.x) * MOVE_THREADS;
  for (int64_t at = int64_t(blockIdx.x) * MOVE_THREADS + threadIdx.x; at < count; at += stride)
    target[at] = make_uint4(uint32_t(at) * 0x9e3779b9u, threadIdx.x, blockIdx.x, uint32_t(at));
}

enum class Pattern { linear, sliced, interleaved };

// A block takes 16 rows, as mma.sync takes its A operand: lane = (row % 8, quarter), rows r and r + 8, so that one warp
// request touches 8 rows and 4 * sizeof(Vector) bytes of each. `sliced`: each warp has an eighth of the row's length.
// `interleaved`: the warps take neighbouring segments. `linear`: the same bytes, loads and blocks, but in memory order.
template <Pattern pattern, class Vector>
__global__ void __launch_bounds__(ROW_THREADS) read_rows(const __grid_constant__ Rows args) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row_vectors = args.row_bytes / int(sizeof(Vector)), turns = row_vectors / 4 / ROW_WARPS;
  const Vector* strip = static_cast<const Vector*>(args.packed) + int64_t(blockIdx.x) * 16 * row_vectors;
  uint32_t sum = 0;
#pragma unroll 4
  for (int turn = 0; turn < turns; turn++) {
    int first = (turn * ROW_WARPS + warp) * 64 + lane, second = first + 32;
    if (pattern != Pattern::linear) {
      const int segment = pattern == Pattern::sliced ? warp * turns + turn : turn * ROW_WARPS + warp;
      first = lane / 4 * row_vectors + segment * 4 + lane % 4;
      second = first + 8 * row_vectors;
    }
    sum ^= fold(__ldg(strip + first)) ^ fold(__ldg(strip + second));
  }
  keep(sum, args.sink);
}

// A thread has 8 codes at a time: a 4-byte load, one 16-byte store. Sixteen fp32 levels in shared memory never
// conflict: different levels lie in different banks, equal ones are broadcast.
__global__ void __launch_bounds__(MOVE_THREADS) dequantize_nf4(const __grid_constant__ Dequantize args) {
  __shared__ float levels[16];
  if (threadIdx.x < 16) levels[threadIdx.x] = __bfloat162float(ptx::pair(args.levels[threadIdx.x]).x);
  __syncthreads();
  const int64_t words = args.codes / 8, base = int64_t(blockIdx.x) * MOVE_VECTORS * MOVE_THREADS + threadIdx.x;
  uint32_t word[MOVE_VECTORS];
  float scale[MOVE_VECTORS];
#pragma unroll
  for (int v = 0; v < MOVE_VECTORS; v++) {
    const int64_t at = min(base + v * MOVE_THREADS, words - 1);
    word[v] = static_cast<const uint32_t*>(args.packed)[at];
    scale[v] = static_cast<const float*>(args.scales)[at / 8];
  }
#pragma unroll
  for (int v = 0; v < MOVE_VECTORS; v++) {
    uint32_t pair[4];
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const float first = levels[word[v] >> (8 * k) & 15], second = levels[word[v] >> (8 * k + 4) & 15];
      pair[k] = ptx::bits(__floats2bfloat162_rn(first * scale[v], second * scale[v]));
    }
    const int64_t at = base + v * MOVE_THREADS;
    if (at < words) static_cast<uint4*>(args.dense)[at] = make_uint4(pair[0], pair[1], pair[2], pair[3]);
  }
}

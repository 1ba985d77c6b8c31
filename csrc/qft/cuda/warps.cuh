// Work for warps: a matrix is cut into pieces, each a part of one row, and the warps of a grid walk over them.
#pragma once

#include "qft/cuda/launch.cuh"

namespace qft::QFT_ISA {

constexpr int kWarps = 8;  // of a block
constexpr int kThreads = kWarps * kWarp;
constexpr unsigned kAllLanes = 0xffffffffu;

// Enough blocks that those which finish early are replaced several times over, few enough that what a block prepares
// (tables, a division) is paid for; not measured.
constexpr int kBlocksPerMultiprocessor = 32;

QFT_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

QFT_HOST_DEVICE constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// A grid of kThreads threads a block for `rows` rows of `parts` pieces.
inline dim3 grid_for(int64_t rows, int64_t parts, int device) {
  const int64_t wanted = ceil_div(rows * parts, kWarps),
                most = int64_t{kBlocksPerMultiprocessor} * multiprocessors(device);
  return dim3(static_cast<unsigned>(least(wanted, most)));
}

__device__ __forceinline__ int lane_of_warp() { return static_cast<int>(threadIdx.x % kWarp); }

// The pieces one warp takes, one after another, neighbouring warps being at neighbouring pieces; divides once.
//
//   for (Walk at(parts); at.row < rows; at.next()) ...
struct Walk {
  int64_t row, part;

  __device__ __forceinline__ explicit Walk(int64_t parts) : parts_(parts) {
    const uint32_t warp = blockIdx.x * kWarps + threadIdx.x / kWarp, warps = gridDim.x * kWarps;
    row = warp / parts;
    part = warp % parts;
    row_step_ = warps / parts;
    part_step_ = warps % parts;
  }

  __device__ __forceinline__ void next() {
    row += row_step_;
    part += part_step_;
    if (part >= parts_) {
      part -= parts_;
      row++;
    }
  }

 private:
  int64_t parts_, row_step_, part_step_;
};

}  // namespace qft::QFT_ISA

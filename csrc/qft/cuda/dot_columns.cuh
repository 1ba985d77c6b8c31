// dot_columns: two matrices multiplied number by number and summed down each column, in two stages of fixed order: the
// rows of a chunk, by one block for 256 columns, then the chunks.
#pragma once

#include "qft/cuda/vectors.cuh"
#include "qft/cuda/warps.cuh"

namespace qft::QFT_ISA {

constexpr int kLaneColumns = 8;
constexpr int kBlockColumns = kLaneColumns * kWarp;  // every warp of a block takes the same columns, each its own rows

// Rows are cut into so many chunks that the device has work, but not below two rows a warp: a chunk costs a row of
// sums.
struct RowChunks {
  int64_t count, rows;  // chunks, rows of a chunk

  RowChunks(int64_t all_rows, int64_t columns, int device) {
    constexpr int blocks_per_multiprocessor = 4, least_rows = 2 * kWarps;
    const int64_t enough = ceil_div(int64_t{blocks_per_multiprocessor} * multiprocessors(device),
                                    ceil_div(columns, kBlockColumns)),
                  most = ceil_div(all_rows, least_rows), wanted = enough < most ? enough : most;
    rows = wanted > 1 ? ceil_div(all_rows, wanted) : all_rows;
    count = rows > 0 ? ceil_div(all_rows, rows) : 1;
  }
};

inline int64_t dot_columns_workspace(int64_t rows, int64_t columns, int device) {
  if (columns <= 0) return 0;
  const int64_t chunks = RowChunks(rows, columns, device).count;
  return chunks > 1 ? chunks * columns : 0;
}

// sums[chunk][columns]
template <class T>
__global__ void __launch_bounds__(kThreads) sum_chunks_kernel(const T* a, const T* b, int64_t rows, int64_t columns,
                                                              int64_t chunk_rows, bool aligned, float* sums) {
  __shared__ float by_warp[kWarps][kLaneColumns][kWarp];
  const unsigned parts = static_cast<unsigned>(ceil_div(columns, kBlockColumns));
  const int64_t chunk = blockIdx.x / parts, first_column = int64_t{blockIdx.x % parts} * kBlockColumns;
  const int warp = static_cast<int>(threadIdx.x / kWarp), lane = lane_of_warp();
  const int64_t column = first_column + lane * kLaneColumns;
  const int64_t first = chunk * chunk_rows, last = first + chunk_rows < rows ? first + chunk_rows : rows;

  float sum[kLaneColumns] = {};
#pragma unroll 2
  for (int64_t row = first + warp; row < last; row += kWarps) {
    float left[kLaneColumns], right[kLaneColumns];
    load_run(a + row * columns + column, columns - column, aligned, left);
    load_run(b + row * columns + column, columns - column, aligned, right);
    for (int k = 0; k < kLaneColumns; k++) sum[k] = fmaf(left[k], right[k], sum[k]);
  }
  for (int k = 0; k < kLaneColumns; k++) by_warp[warp][k][lane] = sum[k];
  __syncthreads();

  const int mine = static_cast<int>(threadIdx.x);  // column of the block
  if (first_column + mine >= columns) return;
  float total = 0;
  for (int i = 0; i < kWarps; i++) total += by_warp[i][mine % kLaneColumns][mine / kLaneColumns];
  sums[chunk * columns + first_column + mine] = total;
}

static __global__ void add_chunks_kernel(const float* sums, int64_t chunks, int64_t columns, float* total) {
  const int64_t column = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (column >= columns) return;
  float sum = 0;
  for (int64_t chunk = 0; chunk < chunks; chunk++) sum += sums[chunk * columns + column];
  total[column] = sum;
}

inline void dot_columns(const DotColumnsArgs& a) {
  static_assert(kBlockColumns == kThreads, "a block ends with one thread a column");
  if (a.columns <= 0) return;
  const RowChunks chunks(a.rows, a.columns, a.place.device);
  const int64_t parts = ceil_div(a.columns, kBlockColumns);
  const bool several = chunks.count > 1;
  with_type(a.dtype, [&](auto number) {
    using T = decltype(number);
    const T *left = static_cast<const T*>(a.a), *right = static_cast<const T*>(a.b);
    launch(a.place, sum_chunks_kernel<T>, dim3(static_cast<unsigned>(parts * chunks.count)), kThreads, 0, left, right,
           a.rows, a.columns, chunks.rows, rows_aligned(left, a.columns) && rows_aligned(right, a.columns),
           several ? a.workspace : a.total);
  });
  if (several)
    launch(a.place, add_chunks_kernel, dim3(static_cast<unsigned>(ceil_div(a.columns, kThreads))), kThreads, 0,
           a.workspace, chunks.count, a.columns, a.total);
}

}  // namespace qft::QFT_ISA

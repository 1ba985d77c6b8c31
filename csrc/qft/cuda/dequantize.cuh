// dequantize: fp32 level x scale, rounded once to the dtype asked for.
#pragma once

#include "qft/cuda/groups.cuh"
#include "qft/cuda/levels.cuh"
#include "qft/cuda/vectors.cuh"
#include "qft/cuda/warps.cuh"

namespace qft::QFT_ISA {

// 16-byte stores of a lane in one piece of a row; the loads of all come before the first use.
constexpr int kStores = 4;

// Columns of a piece: a store's lanes lie side by side, so that each 32-byte sector of the output is written whole.
template <class T>
constexpr int kStep = kWarp * kPerVector<T>;  // from one store of a lane to its next
template <class T>
constexpr int kPieceColumns = kStores * kStep<T>;

// Rows row0 .. row0 + rows - 1 of W, columns col0 .. col0 + columns - 1, to out[rows][stride].
template <class T>
struct Rectangle {
  int64_t row0, rows, col0, columns;
  T* out;
  int64_t stride;
  bool aligned;  // rows of out
};

template <class F, class T>
__global__ void __launch_bounds__(kThreads, 4)  // up to 64 registers: with fewer some spill
    dequantize_kernel(Weight w, LevelTable levels, GroupSize group, Rectangle<T> to) {
  constexpr int run = kPerVector<T>;  // codes of one store: an octet, or half of one in fp32
  __shared__ SharedTables tables;
  fill_tables(tables, levels, w);

  for (Walk at(ceil_div(to.columns, kPieceColumns<T>)); at.row < to.rows; at.next()) {
    const int64_t o = to.row0 + at.row, first = at.part * kPieceColumns<T> + lane_of_warp() * run;
    const int64_t column = to.col0 + first;
    const OctetPlace place = place_of<F::bits>(w.codes + o * w.row_bytes, column);
    const int half = run == kOctet ? 0 : static_cast<int>(column % kOctet);
    const int left = static_cast<int>(least(to.columns - first, kPieceColumns<T>));  // this lane's stores start below

    Octet<F::bits> codes[kStores] = {};
    float scale[kStores] = {}, zero[kStores] = {};
#pragma unroll
    for (int i = 0; i < kStores; i++) {
      if (i * kStep<T> >= left) continue;
      codes[i] = load_octet<F::bits>(place, i * (kStep<T> / kRecord));
      scale[i] = scale_at(w, tables.dynamic_map, o, group.of(column + i * kStep<T>));
      zero[i] = zero_of<F>(w, o, group.of(column + i * kStep<T>));
    }

    T* out = to.out + at.row * to.stride + first;
#pragma unroll
    for (int i = 0; i < kStores; i++) {
      if (i * kStep<T> >= left) continue;
      float weights[run];
      decode<F>(codes[i], place.octet, half, w, tables, weights);
      for (int k = 0; k < run; k++) weights[k] = (weights[k] - zero[i]) * scale[i];
      store_run(out + i * kStep<T>, left - i * kStep<T>, to.aligned, weights);
    }
  }
}

template <class F>
void dequantize(const DequantizeArgs& a) {
  const int64_t rows = a.row1 - a.row0, columns = a.col1 - a.col0;
  if (rows <= 0 || columns <= 0) return;
  with_type(a.dtype, [&](auto number) {
    using T = decltype(number);
    T* out = static_cast<T*>(a.out);
    const Rectangle<T> to{a.row0, rows, a.col0, columns, out, a.stride, rows_aligned(out, a.stride)};
    launch(a.place, dequantize_kernel<F, T>, grid_for(rows, ceil_div(columns, kPieceColumns<T>), a.place.device),
           kThreads, 0, a.weight, level_table<F>(a.weight), GroupSize(a.weight.group, a.weight.groups), to);
  });
}

}  // namespace qft::QFT_ISA

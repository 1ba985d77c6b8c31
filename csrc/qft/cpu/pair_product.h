// matmul and matmul_t by dot products of bf16 for many rows: a piece of W at a time is decoded into a core's own cache,
// in the order in which products read it, once for every few hundred rows of x or dy.
#pragma once

#include "qft/cpu/companions.h"
#include "qft/cpu/matmul.h"
#include "qft/cpu/pair_tiles.h"
#include "qft/cpu/pairs.h"
#include "qft/launch.h"

namespace qft::QFT_ISA {

constexpr int64_t kPackedBytes = 8 << 20;         // of rows packed at a time
constexpr int64_t kPackedRows = 11 * kStripRows;  // and how many: a thread's sums of them stay in its own cache
constexpr int kPieceBlocks = 2;                   // blocks of 128 codes, or of 128 rows of W, that a piece is deep
constexpr int kPiecePairs = kPieceBlocks * kBlockPairs;

// Rows packed at a time, each time about as many.
static inline int64_t rows_at_a_time(int64_t rows, int64_t pairs) {
  const int64_t fit = kPackedBytes / (4 * pairs) / kStripRows * kStripRows;
  const int64_t most = fit < kStripRows ? kStripRows : least(fit, kPackedRows), times = (rows + most - 1) / most;
  return ((rows + times - 1) / times + 15) / 16 * 16;
}

// y: a piece is a stretch of 64 rows of W, or of fewer where there would be too few for all threads.
template <class Block>
struct Forward {
  static constexpr LoadPairs load = load_code_pairs;
  static constexpr int most_outputs = 64;

  const PairWeight<Block>& weight;
  int outputs;

  Forward(const PairWeight<Block>& weight, int threads) : weight(weight), outputs(most_outputs) {
    while (outputs > 16 && weight.w.out < int64_t{4} * outputs * threads) outputs /= 2;
  }

  int64_t width() const { return weight.w.in; }
  int64_t all_outputs() const { return weight.w.out; }

  void decode(int64_t output, int64_t first, int64_t steps, float* scale_row, float* zero_row, uint32_t* piece) const {
    const int64_t from = first / kBlockPairs, to = (first + steps) / kBlockPairs;
    for (int64_t o = 0; o < outputs; o++)
      weight.row(least(output + o, weight.w.out - 1), from, to, 0, kPieceBlocks, scale_row, zero_row,
                 [&](int64_t b, const Block& block) {
                   uint32_t* const at = piece + o * kPiecePairs + (b - from) * kBlockPairs;
                   for (int v = 0; v < kPairVectors; v++) store_pairs(at + 16 * v, block[v]);
                 });
  }

  void add(const Strips& strips, const uint32_t* packed, int64_t strip, int64_t first, int64_t steps,
           const uint32_t* piece, float* sums) const {
    for (int o = 0; o < outputs; o += kTileColumns)
      add_strip({piece + o * kPiecePairs, kPiecePairs, 1}, strips, packed, strip, first, steps,
                sums + o * strips.rows + strip * kStripRows, strips.rows);
  }
};

// dx: a piece is a block of columns of some rows of W, which become pairs of neighbours.
template <class Block>
struct Backward {
  static constexpr LoadPairs load = load_neighbours;
  static constexpr int most_outputs = kBlock, outputs = kBlock;

  const PairWeight<Block>& weight;

  Backward(const PairWeight<Block>& weight, int) : weight(weight) {}

  int64_t width() const { return weight.w.out; }
  int64_t all_outputs() const { return weight.w.in; }

  // [pair of rows][vector of 16 columns 8 l + v]
  void decode(int64_t column, int64_t first, int64_t steps, float* scale_row, float* zero_row, uint32_t* piece) const {
    const int64_t b = column / kBlock, out = weight.w.out;
    for (int64_t s = 0; s < steps; s++) {
      Pairs rows[2][kPairVectors];
      for (int i = 0; i < 2; i++) {
        const int64_t o = 2 * (first + s) + i;
        if (o < out)
          weight.row(o, b, b + 1, 2 * kPiecePairs, 0, scale_row, zero_row, [&](int64_t, const Block& block) {
            for (int v = 0; v < kPairVectors; v++) rows[i][v] = block[v];
          });
        else
          for (int v = 0; v < kPairVectors; v++) rows[i][v] = no_pairs();
      }
      uint32_t* const at = piece + s * kBlock;
      for (int v = 0; v < kPairVectors; v++) {
        store_pairs(at + 16 * v, lower_halves(rows[0][v], rows[1][v]));
        store_pairs(at + 16 * (v + kPairVectors), upper_halves(rows[0][v], rows[1][v]));
      }
    }
  }

  void add(const Strips& strips, const uint32_t* packed, int64_t strip, int64_t first, int64_t steps,
           const uint32_t* piece, float* sums) const {
    for (int l = 0; l < 16; l += kTileColumns)
      for (int v = 0; v < 8; v++)
        add_strip({piece + 16 * v + l, 1, kBlock}, strips, packed, strip, first, steps,
                  sums + code_at(v, l) * strips.rows + strip * kStripRows, 8 * strips.rows);
  }
};

// to[rows][outputs] = from[rows][width] times what Side makes of W.
template <class Side, class Block>
static void run_pair_product(const Weight& w, const void* from, void* to, int64_t rows, int threads) {
  const PairWeight<Block> weight(w);
  const Side side(weight, threads);
  const int64_t pairs = blocks(side.width()) * kBlockPairs, outputs = side.all_outputs();
  const int64_t tasks = (outputs + side.outputs - 1) / side.outputs, at_a_time = rows_at_a_time(rows, pairs);
  const Scratch packed(at_a_time * pairs);
  uint32_t* const operand = reinterpret_cast<uint32_t*>(packed.data);
#pragma omp parallel num_threads(team(threads, w.out* w.in* rows))
  {
    Scratch scale_row(weight.scales.row_floats()), zero_row(weight.zeros.row_floats());
    Scratch piece(Side::most_outputs * kPiecePairs), sums(Side::most_outputs * at_a_time);
    uint32_t* const decoded = reinterpret_cast<uint32_t*>(piece.data);
    for (int64_t row = 0; row < rows; row += at_a_time) {
      const int64_t count = least(at_a_time, rows - row);
      const Strips strips{(count + 15) / 16 * 16, pairs};
      pack<Side::load>(static_cast<const uint16_t*>(from) + row * side.width(), count, side.width(), strips, operand);
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < tasks; task++) {
        const int64_t first = task * side.outputs;
        for (int64_t pair = 0; pair < pairs; pair += kPiecePairs) {
          const int64_t steps = least(kPiecePairs, pairs - pair);
          side.decode(first, pair, steps, scale_row.data, zero_row.data, decoded);
          for (int64_t strip = 0; strip < strips.count(); strip++)
            side.add(strips, operand, strip, pair, steps, decoded, sums.data);
        }
        store_transposed(sums.data, strips.rows, least(side.outputs, outputs - first), count,
                         static_cast<uint16_t*>(to) + row * outputs + first, outputs);
      }
    }
  }
}

template <class Block>
struct ManyRows {
  const MatmulArgs& a;
  explicit ManyRows(const MatmulArgs& args) : a(args) {}
  void run() const { run_pair_product<Forward<Block>, Block>(a.weight, a.x, a.y, a.rows, a.place.threads); }
};
template <class Block>
struct ManyRowsT {
  const MatmulTArgs& a;
  explicit ManyRowsT(const MatmulTArgs& args) : a(args) {}
  void run() const { run_pair_product<Backward<Block>, Block>(a.weight, a.dy, a.dx, a.rows, a.place.threads); }
};

}  // namespace qft::QFT_ISA

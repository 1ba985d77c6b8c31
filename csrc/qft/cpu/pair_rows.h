// matmul by dot products of bf16 for a few rows of x: lanes run along a row of W, and a block's weights are made once
// for up to kPairRows rows of x. A thread takes a group of outputs, and of them a stretch of columns at a time, so that
// the activations there stay in the first-level cache: each vector of them is used two or four times only.
#pragma once

#include "qft/cpu/ahead.h"
#include "qft/cpu/matmul.h"
#include "qft/cpu/pairs.h"
#include "qft/launch.h"

namespace qft::QFT_ISA {

constexpr int kPairRows = 8;
constexpr int pair_outputs(int64_t rows) { return rows > 4 ? 2 : 4; }  // the sums of a tile stay in 16 registers
constexpr int64_t kStretchBytes = 8 << 10;  // of activations, for each output of a tile: it uses them so many times

// Outputs of a group: their codes in a stretch, a stretch ahead, find room beside the activations.
constexpr int pair_group(int64_t rows) { return rows > 4 ? 16 : 8; }
constexpr int kMostGroup = 16;

// x[rows][in] -> [blocks][rows][kPairVectors], zeros past the end; shared among the team
static inline void pair_rows(const MatmulArgs& a, Pairs* to) {
  const int64_t in = a.weight.in, count = blocks(in);
#pragma omp for schedule(static)
  for (int64_t i = 0; i < a.rows * count; i++) {
    const int64_t b = i / a.rows, r = i % a.rows;
    Pairs block[kPairVectors];
    load_code_pairs(static_cast<const uint16_t*>(a.x) + r * in + b * kBlock, in - b * kBlock, block);
    for (int v = 0; v < kPairVectors; v++) to[i * kPairVectors + v] = block[v];
  }
}

// A group's rows of W; past the end of W its last is repeated.
struct GroupRows {
  int64_t number[kMostGroup];
  const uint8_t* codes[kMostGroup];
  const float* scales[kMostGroup];
  const float* zeros[kMostGroup];
};

// How much further in W that lies which is asked for.
struct Further {
  int64_t rows, blocks;
};

// Asks for what `outputs` rows need that much later: one row's stretch after the other, for processors follow a run of
// addresses and bring more of it by themselves.
template <class Block, int outputs>
class Asking {
 public:
  Asking(const PairWeight<Block>& weight, const int64_t* rows, int64_t first, int64_t stretch, Further further)
      : weight_(weight),
        rows_(rows),
        further_{further.rows, further.blocks + first},
        turn_((stretch + outputs - 1) / outputs),
        scale_step_(weight.scales.stored_before(outputs)),
        zero_step_(weight.zeros.stored_before(outputs)) {}

  // once a block of all outputs, which is as much as `outputs` blocks of one
  inline __attribute__((always_inline)) void ask() {
    constexpr int64_t bytes = outputs * PairWeight<Block>::block_bytes;
    if (left_-- == 0) start();
#pragma GCC unroll 8
    for (int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch(codes_ + i);
    codes_ += bytes;
    __builtin_prefetch(scales_);
    scales_ += scale_step_;
    if constexpr (Block::shifted) {
      __builtin_prefetch(zeros_);
      zeros_ += zero_step_;
    }
  }

 private:
  const PairWeight<Block>& weight_;
  const int64_t* rows_;  // the next
  const Further further_;
  const int64_t turn_, scale_step_, zero_step_;
  int64_t left_ = 0;  // blocks until then
  const uint8_t* codes_;
  const char *scales_, *zeros_;

  void start() {
    const int64_t row = *rows_++ + further_.rows;
    codes_ = weight_.decoder.row(row) + further_.blocks * PairWeight<Block>::block_bytes;
    scales_ = weight_.scales.stored(row) + weight_.scales.stored_before(further_.blocks);
    zeros_ = weight_.zeros.stored(row) + weight_.zeros.stored_before(further_.blocks);
    left_ = turn_ - 1;
  }
};

// `rows` rows of x against pair_outputs(rows) of a group's.
template <class Block, int rows>
struct PairTile {
  static constexpr int outputs = pair_outputs(rows);
  static constexpr int64_t bytes = PairWeight<Block>::block_bytes;

  const PairWeight<Block>& weight;
  const GroupRows& w;
  int at;            // of the group's outputs
  const Pairs* x;    // of block 0
  int64_t x_stride;  // from block to block

  // adds block b, whose codes lie at p[o]
  inline __attribute__((always_inline)) void add(const uint8_t* const* p, int64_t b, Vec (&sums)[rows][outputs]) const {
    Block weights[outputs];
#pragma GCC unroll 4
    for (int o = 0; o < outputs; o++)
      weights[o] = Block(weight.decoder, weight.grouping, p[o], w.scales[at + o], w.zeros[at + o], b);
    const Pairs* in = x + b * x_stride;
#pragma GCC unroll 4
    for (int v = 0; v < kPairVectors; v++) {
      Pairs pairs[outputs];
#pragma GCC unroll 4
      for (int o = 0; o < outputs; o++) pairs[o] = weights[o][v];
#pragma GCC unroll 8
      for (int r = 0; r < rows; r++) {
        const Pairs one = load_pairs(in + r * kPairVectors + v);
#pragma GCC unroll 4
        for (int o = 0; o < outputs; o++) sums[r][o] = dot(sums[r][o], pairs[o], one);
      }
    }
  }

  // blocks first .. last - 1, on top of `kept`, which holds what came before
  void run(int64_t first, int64_t last, Asking<Block, outputs> asking, Vec* kept) const {
    Vec sums[rows][outputs];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
      for (int o = 0; o < outputs; o++) sums[r][o] = first ? kept[r * outputs + o] : zero();
    const int64_t whole = weight.decoder.whole_blocks();
    uint8_t copies[outputs][bytes];
    const uint8_t* p[outputs];
    for (int64_t b = first; b < last; b++) {
      asking.ask();
#pragma GCC unroll 4
      for (int o = 0; o < outputs; o++) p[o] = w.codes[at + o] + b * bytes;
      if (b == whole)
        for (int o = 0; o < outputs; o++) p[o] = weight.decoder.block(w.codes[at + o], b, copies[o]);
      add(p, b, sums);
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
      for (int o = 0; o < outputs; o++) kept[r * outputs + o] = sums[r][o];
  }
};

template <class Block>
class FewRows {
 public:
  explicit FewRows(const MatmulArgs& args) : a_(args), weight_(a_.weight), group_(pair_group(a_.rows)) {}

  void run() const {
    const Weight& w = a_.weight;
    const int64_t groups = (w.out + group_ - 1) / group_, count = blocks(w.in);
    const int64_t scale_floats = weight_.scales.row_floats(), zero_floats = weight_.zeros.row_floats();
    const int threads = team(a_.place.threads, w.out * w.in * a_.rows);
    const int64_t chunk = tiles_at_a_time(groups, threads);
    const Scratch x(a_.rows * count * kBlockPairs);
    Pairs* const pairs = reinterpret_cast<Pairs*>(x.data);
#pragma omp parallel num_threads(threads)
    {
      pair_rows(a_, pairs);
      Scratch scale_rows(group_ * scale_floats), zero_rows(group_ * zero_floats);
#pragma omp for schedule(dynamic, chunk)
      for (int64_t group = 0; group < groups; group++) {
        GroupRows rows;
        for (int o = 0; o < group_; o++) {
          const int64_t row = rows.number[o] = least(group * group_ + o, w.out - 1);
          rows.codes[o] = weight_.decoder.row(row);
          rows.scales[o] = weight_.scales.row(row, 0, count, scale_rows.data + o * scale_floats);
          rows.zeros[o] = weight_.zeros.row(row, 0, count, zero_rows.data + o * zero_floats);
        }
        for (int64_t row = 0; row < a_.rows; row += kPairRows) some_rows<kPairRows>(rows, pairs, group * group_, row);
      }
    }
  }

 private:
  const MatmulArgs& a_;
  const PairWeight<Block> weight_;
  const int group_;

  // from row `row` of x to its end, or `most` of them
  template <int most>
  void some_rows(const GroupRows& w, const Pairs* x, int64_t first, int64_t row) const {
    if constexpr (most > 1)
      if (a_.rows - row < most) return some_rows<most - 1>(w, x, first, row);
    using Tile = PairTile<Block, most>;
    constexpr int64_t fit = Tile::outputs * kStretchBytes / (most * kPairVectors * sizeof(Pairs));
    const int64_t count = blocks(a_.weight.in), stretches = (count + fit - 1) / fit;
    const int64_t stretch = (count + stretches - 1) / stretches;
    Vec kept[kMostGroup * most];
    for (int64_t b = 0; b < count; b += stretch) {
      const int64_t end = least(b + stretch, count);
      const Further further =
          end < count ? Further{0, stretch} : Further{group_, -b};  // the next group's first stretch
      for (int at = 0; at < group_; at += Tile::outputs)
        Tile{weight_, w, at, x + row * kPairVectors, a_.rows * kPairVectors}.run(
            b, end, Asking<Block, Tile::outputs>(weight_, w.number + at, b, stretch, further), kept + at * most);
    }
    for (int o = 0; o < group_ && first + o < a_.weight.out; o++)
      for (int r = 0; r < most; r++) {
        const Vec* tile = kept + o / Tile::outputs * Tile::outputs * most;
        write(a_.y, (row + r) * a_.weight.out + first + o, sum(tile[r * Tile::outputs + o % Tile::outputs]), a_.dtype);
      }
  }
};

}  // namespace qft::QFT_ISA

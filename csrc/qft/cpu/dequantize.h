// dequantize: fp32 level x scale, rounded once to the dtype asked for. A group has few levels, so its weights are made
// once and looked up; 8-bit codes are converted one by one.
#pragma once

#include "qft/cpu/ahead.h"
#include "qft/cpu/companions.h"
#include "qft/cpu/decoder.h"
#include "qft/launch.h"

namespace qft::QFT_ISA {

// An output from this size on goes past the caches, which it would only empty of what is needed next: above the panels
// that products read back at once, below what caches hold.
constexpr int64_t kPastCachesBytes = 16 << 20;

// Rows of W that become weights, one row after the other.
template <class F>
class DenseRows {
 public:
  DenseRows(const Decoder<F>& decoder, const Grouping& grouping)
      : decoder_(decoder), grouping_(grouping), weights_(decoder.table) {}

  void start(int64_t o, const float* scales, const float* zeros) {
    codes_ = decoder_.row(o);
    scales_ = scales;
    zeros_ = zeros;
    group_ = -1;
  }

  // calls put(i, weights) for the vectors i of block b, in order, in fp32
  template <class Put>
  void block(int64_t b, Put put) {
    uint8_t copy[Decoder<F>::block_bytes];
    const uint8_t* p = decoder_.block(codes_, b, copy);
    const auto words = Decoder<F>::words(p);
#pragma GCC unroll kUnroll
    for (int i = 0; i < 8; i++) {
      const int64_t group = grouping_.of_sub(b, i / 2);
      if constexpr (F::bits == 8) {
        Vec v = decoder_.levels_in_order(p, words, i);
        if (zeros_) v = sub(v, broadcast(zeros_[group]));
        put(i, mul(v, broadcast(scales_[group])));
      } else {
        if (group != group_) enter(group);
        put(i, weights_[in_order<code_stride(F::bits)>(words.low, i)]);
      }
    }
  }

  // whole blocks first .. last - 1 in bf16 or fp16: put(j, weights) for 32 of them from column j on
  template <Dtype dtype, class Put>
  void halves(int64_t first, int64_t last, Put put) {
    grouping_.per_block == 4   ? halves_of<dtype, 4>(first, last, put)
    : grouping_.per_block == 2 ? halves_of<dtype, 2>(first, last, put)
                               : halves_of<dtype, 1>(first, last, put);
  }

 private:
  const Decoder<F>& decoder_;
  const Grouping& grouping_;
  const uint8_t* codes_ = nullptr;
  const float* scales_ = nullptr;
  const float* zeros_ = nullptr;  // or null
  decltype(Decoder<F>::table) weights_;
  int64_t group_ = -1;  // whose weights they are

  void enter(int64_t group) {
    const bool shifted = F::kind == Levels::integer && zeros_;
    weights_.set_weights(decoder_.table, broadcast(scales_[group]), broadcast(shifted ? zeros_[group] : 0));
    group_ = group;
  }

  template <Dtype dtype, int per_block, class Put>
  void halves_of(int64_t first, int64_t last, Put put) {
    constexpr int subs = kSubs / per_block;  // of a group
    HalfTable<F::bits> table;
    for (int64_t b = first; b < last; b++) {
      const auto words = Decoder<F>::words(codes_ + b * Decoder<F>::block_bytes);
#pragma GCC unroll 4
      for (int part = 0; part < per_block; part++) {
        const int64_t group = per_block == 1 ? grouping_.first(b) : b * per_block + part;
        if (per_block > 1 || group != group_) {
          enter(group);
          table.set(weights_, dtype == Dtype::bf16);
        }
#pragma GCC unroll 4
        for (int sub = part * subs; sub < (part + 1) * subs; sub++)
          put(b * kBlock + sub * kSub, table.template in_order<code_stride(F::bits)>(words.low, sub));
      }
    }
  }
};

template <class F>
static void dequantize(const DequantizeArgs& a) {
  const Weight& w = a.weight;
  const Decoder<F> decoder(w);
  const Grouping grouping(w);
  const Companion scales = Companion::scales(w, grouping), zeros = Companion::zeros(w, grouping);
  const int64_t first = a.col0 / kBlock, last = blocks(a.col1), whole = a.col1 / kBlock;
  const int64_t width = a.dtype == Dtype::f32 ? 4 : 2, bytes = (a.row1 - a.row0) * a.stride * width;
  const bool aligned = (reinterpret_cast<uintptr_t>(a.out) | static_cast<uintptr_t>(a.stride * width)) % 64 == 0;
  const bool past_caches = bytes >= kPastCachesBytes && aligned;
  const int64_t ahead = 1 + kAheadBytes / ((last - first) * Decoder<F>::block_bytes + 1);  // rows
#pragma omp parallel num_threads(a.place.threads)
  {
    Scratch scale_row(scales.row_floats()), zero_row(zeros.row_floats());
    DenseRows<F> rows(decoder, grouping);
#pragma omp for schedule(static) nowait
    for (int64_t o = a.row0; o < a.row1; o++) {
      ask_for(w, scales, zeros, least(o + ahead, w.out - 1), first, last, Decoder<F>::block_bytes);
      rows.start(o, scales.row(o, first, last, scale_row.data), zeros.row(o, first, last, zero_row.data));
      const int64_t start = (o - a.row0) * a.stride - a.col0;
      const auto fp32_wise = [&] {
        for (int64_t b = first; b < whole; b++)
          rows.block(b, [&](int i, Vec v) { store_as(a.out, start + b * kBlock + 16 * i, v, a.dtype); });
      };
      if constexpr (kHalfTables && F::bits < 8) {
        uint16_t* const out = static_cast<uint16_t*>(a.out) + start;
        const auto put = [=](int64_t j, auto v) { past_caches ? stream_halves(out + j, v) : store_halves(out + j, v); };
        a.dtype == Dtype::f32    ? fp32_wise()
        : a.dtype == Dtype::bf16 ? rows.template halves<Dtype::bf16>(first, whole, put)
                                 : rows.template halves<Dtype::f16>(first, whole, put);
      } else {
        fp32_wise();
      }
      if (whole < last) {
        float dense[kBlock];
        rows.block(whole, [&](int i, Vec v) { store(dense + 16 * i, v); });
        write_run(a.out, start + whole * kBlock, a.col1 - whole * kBlock, a.dtype, dense);
      }
    }
    if constexpr (kHalfTables && F::bits < 8)
      if (past_caches) finish_streams();
  }
}

}  // namespace qft::QFT_ISA

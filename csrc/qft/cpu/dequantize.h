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

// The weights of a row in fp32, vector by vector.
template <class F>
class DenseRow {
 public:
  DenseRow(const Decoder<F>& decoder, const Grouping& grouping, int64_t o, const float* scales, const float* zeros)
      : decoder_(decoder),
        grouping_(grouping),
        codes_(decoder.row(o)),
        scales_(scales),
        zeros_(zeros),
        weights_(decoder.table) {}

  // calls put(i, weights) for the vectors i of block b, in order
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
        enter(group);
        put(i, weights_[in_order<code_stride(F::bits)>(words.low, i)]);
      }
    }
  }

  // whole blocks first .. last - 1 in bf16 or fp16, put(j, weights) for 32 of them from column j on
  template <class Put>
  void halves(int64_t first, int64_t last, bool bf16, Put put) {
    HalfTable<F::bits> table;
    for (int64_t b = first; b < last; b++) {
      uint8_t copy[Decoder<F>::block_bytes];
      const auto words = Decoder<F>::words(decoder_.block(codes_, b, copy));
#pragma GCC unroll 4
      for (int sub = 0; sub < kSubs; sub++) {
        if (enter(grouping_.of_sub(b, sub))) table.set(weights_, bf16);
        put(b * kBlock + sub * kSub, table.template in_order<code_stride(F::bits)>(words.low, sub));
      }
    }
  }

 private:
  const Decoder<F>& decoder_;
  const Grouping& grouping_;
  const uint8_t* codes_;
  const float* scales_;
  const float* zeros_;  // or null
  decltype(Decoder<F>::table) weights_;
  int64_t group_ = -1;

  // makes weights_ those of a group; false where they are already
  bool enter(int64_t group) {
    if (group == group_) return false;
    weights_.set_weights(decoder_.table, broadcast(scales_[group]), broadcast(zeros_ ? zeros_[group] : 0));
    group_ = group;
    return true;
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
  const int64_t ahead = 1 + kAheadBytes / ((last - first) * Decoder<F>::block_bytes);  // rows
#pragma omp parallel num_threads(a.place.threads)
  {
    Scratch scale_row(scales.row_floats()), zero_row(zeros.row_floats());
#pragma omp for schedule(static)
    for (int64_t o = a.row0; o < a.row1; o++) {
      ask_for(w, scales, zeros, least(o + ahead, w.out - 1), first, last, Decoder<F>::block_bytes);
      DenseRow<F> row(decoder, grouping, o, scales.row(o, first, last, scale_row.data),
                      zeros.row(o, first, last, zero_row.data));
      const int64_t start = (o - a.row0) * a.stride - a.col0;
      if constexpr (kHalfTables && F::bits < 8) {
        if (a.dtype != Dtype::f32)
          row.halves(first, whole, a.dtype == Dtype::bf16, [&](int64_t j, auto weights) {
            store_halves(static_cast<uint16_t*>(a.out) + start + j, weights, past_caches);
          });
      }
      if (!(kHalfTables && F::bits < 8) || a.dtype == Dtype::f32)
        for (int64_t b = first; b < whole; b++)
          row.block(b, [&](int i, Vec v) { store_as(a.out, start + b * kBlock + 16 * i, v, a.dtype); });
      if (whole < last) {
        float dense[kBlock];
        row.block(whole, [&](int i, Vec v) { store(dense + 16 * i, v); });
        write_run(a.out, start + whole * kBlock, a.col1 - whole * kBlock, a.dtype, dense);
      }
    }
  }
}

}  // namespace qft::QFT_ISA

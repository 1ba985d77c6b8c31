// From a row's bytes to weights in bf16, two a lane, as dot products of bf16 take them. They are dequantize's own:
// level times scale in fp32, rounded once. A group's weights are made once and looked up, 32 codes at a time.
#pragma once

#include "qft/cpu/companions.h"
#include "qft/cpu/decoder.h"

namespace qft::QFT_ISA {

// Lane l of vector v holds the weights of codes 8 l + v and 8 l + v + 4: a lane's word has four codes in each half, and
// a shift brings two of them to the bottom of theirs.
constexpr int kPairVectors = 4;
constexpr int kBlockPairs = kBlock / 2;

// Block b of a row of W, whose codes lie at p; `four_groups` where a group is 32 codes.
template <class F, bool four_groups, bool subtract_zeros>
class PairBlock {
 public:
  using Format = F;
  static constexpr bool shifted = subtract_zeros;

  PairBlock() = default;
  PairBlock(const Decoder<F>& decoder, const Grouping& grouping, const uint8_t* p, const float* scales,
            const float* zeros, int64_t b)
      : words_(words(p)), weights_([&](int i) {
          const int64_t group = four_groups ? 4 * b + i : grouping.first(b) + (grouping.per_block > 1 ? i : 0);
          const Vec levels = decoder.table.entry;
          return mul(shifted ? sub(levels, broadcast(zeros[group])) : levels, broadcast(scales[group]));
        }) {}

  Pairs operator[](int v) const { return weights_[shift_right(words_, v * code_stride(F::bits))]; }

 private:
  Codes words_;
  GroupTable<four_groups> weights_;

  static Codes words(const uint8_t* p) {
    if constexpr (F::bits == 1) return load_split_nibbles(p);
    if constexpr (F::bits == 2) return load_split_bytes(p);
    return Decoder<F>::words(p).low;
  }
};

// 8-bit codes are converted, not looked up.
template <class F, bool subtract_zeros>
class OctetPairBlock {
 public:
  using Format = F;
  static constexpr bool shifted = subtract_zeros;

  OctetPairBlock() = default;
  OctetPairBlock(const Decoder<F>& decoder, const Grouping& grouping, const uint8_t* p, const float* scales,
                 const float* zeros, int64_t b)
      : decoder_(&decoder), words_(Decoder<F>::words(p)), scales_(grouping.lanes(scales, b)) {
    if constexpr (shifted) zeros_ = grouping.lanes(zeros, b);
  }

  Pairs operator[](int v) const { return pair_up(weights(v), weights(v + 4)); }

 private:
  const Decoder<F>* decoder_;
  typename Decoder<F>::Words words_;
  Vec scales_, zeros_;

  Vec weights(int v) const {
    const Vec levels = decoder_->levels(words_, v);
    return mul(shifted ? sub(levels, zeros_) : levels, scales_);
  }
};

// A weight whose blocks come as pairs.
template <class Block>
struct PairWeight {
  using CodeDecoder = Decoder<typename Block::Format>;
  static constexpr int64_t block_bytes = CodeDecoder::block_bytes;

  const Weight& w;
  const Grouping grouping;
  const CodeDecoder decoder;
  const Companion scales, zeros;

  explicit PairWeight(const Weight& weight)
      : w(weight),
        grouping(w),
        decoder(w),
        scales(Companion::scales(w, grouping)),
        zeros(Companion::zeros(w, grouping)) {}

  // Of row o, put(b, weights) for blocks first .. last - 1; asks for those that lie so many rows and blocks further.
  template <class Put>
  void row(int64_t o, int64_t first, int64_t last, int64_t rows_ahead, int64_t blocks_ahead, float* scale_row,
           float* zero_row, Put put) const {
    const uint8_t* const codes = decoder.row(o);
    const float *const scale = scales.row(o, first, last, scale_row), *const zero = zeros.row(o, first, last, zero_row);
    __builtin_prefetch(scales.stored(o + rows_ahead) + scales.stored_before(first + blocks_ahead));
    if (Block::shifted) __builtin_prefetch(zeros.stored(o + rows_ahead) + zeros.stored_before(first + blocks_ahead));
    for (int64_t b = first; b < last; b++) {
      __builtin_prefetch(codes + rows_ahead * w.row_bytes + (b + blocks_ahead) * block_bytes);
      uint8_t copy[block_bytes];
      put(b, Block(decoder, grouping, decoder.block(codes, b, copy), scale, zero, b));
    }
  }
};

// Runs `Product` on the blocks that a call's weight has.
template <class F, bool shifted, template <class> class Product, class Args>
static void run_on_blocks(const Args& args) {
  if constexpr (F::bits == 8)
    Product<OctetPairBlock<F, shifted>>(args).run();
  else if (Grouping(args.weight).per_block == 4)
    Product<PairBlock<F, true, shifted>>(args).run();
  else
    Product<PairBlock<F, false, shifted>>(args).run();
}
template <class F, template <class> class Product, class Args>
static void run_on(const Args& args) {
  if constexpr (F::kind == Levels::integer)
    if (args.weight.zeros) return run_on_blocks<F, true, Product>(args);
  run_on_blocks<F, false, Product>(args);
}

}  // namespace qft::QFT_ISA

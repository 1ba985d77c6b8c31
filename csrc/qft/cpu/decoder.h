// From a row's bytes to levels, 128 codes at a time: for products in the order that costs its instruction set least,
// or in the codes' own.
#pragma once

#include "qft/cpu/arrays.h"
#include "qft/cpu/byte_levels.h"
#include "qft/decode.h"

namespace qft::QFT_ISA {

template <class F>
struct Decoder {
  using Bytes = ByteLevels<F::kind, F::bits>;

  static constexpr int64_t block_bytes = packed_bytes(F::bits, kBlock);

  // One block: lane l of `low` holds codes 8 l .. 8 l + 7; 8-bit codes take a second word for the later four.
  struct Words {
    Codes low, high;
  };

  Table<(F::bits < 8 ? F::bits : 4)> table;
  Bytes bytes;
  Vec base;  // of 8-bit integers, which convert instead of looking up: 2^23 less the lowest level
  const Weight& w;

  explicit Decoder(const Weight& weight)
      : table(F::codebook(weight.levels, weight.zeros != nullptr)),
        bytes(F::codebook(weight.levels, weight.zeros != nullptr), weight.zeros != nullptr),
        base(broadcast(weight.zeros ? 0x1p23f : 0x1p23f + 128)),
        w(weight) {}

  static Words words(const uint8_t* p) {
    Words words;
    if constexpr (F::bits == 8)
      load_octets(p, &words.low, &words.high);
    else
      words.low = F::bits == 4   ? load_words(p)
                  : F::bits == 3 ? load_records(p)
                  : F::bits == 2 ? load_halves(p)
                                 : load_bytes(p);
    return words;
  }

  // which code of its block lane l of levels(words, v) stands for; groups of four lanes share 32 codes, in order
  static constexpr int column(int v, int l) { return Bytes::column(v, l); }

  // levels of the codes column(v, l), in units of bytes.unit
  Vec levels(const Words& words, int v) const {
    if constexpr (Bytes::used) return bytes(words.low, words.high, v);
    if constexpr (F::bits == 8)
      return sub(low_byte_above_2_23(shift_right(v < 4 ? words.low : words.high, 8 * (v % 4))), base);
    return table.template code<code_stride(F::bits)>(words.low, v);
  }

  // levels of codes 16 i + l of the block at p
  Vec levels_in_order(const uint8_t* p, const Words& words, int i) const {
    if constexpr (F::bits == 8) return sub(low_byte_above_2_23(load_bytes(p + 16 * i)), base);
    return table[in_order<code_stride(F::bits)>(words.low, i)];
  }

  const uint8_t* row(int64_t o) const { return w.codes + o * w.row_bytes; }

  // Blocks of a row that lie whole inside it; a last one may be cut short by the row's padding.
  int64_t whole_blocks() const { return w.row_bytes / block_bytes; }

  // Block b of a row. One that is cut short is copied out, so that no load passes the end of the row.
  const uint8_t* block(const uint8_t* row, int64_t b, uint8_t* copy) const {
    const uint8_t* p = row + b * block_bytes;
    const int64_t left = w.row_bytes - b * block_bytes;
    if (left >= block_bytes) return p;
    copy_cut(p, left, copy);
    return copy;
  }

 private:
  // once a row at most, so it is kept out of the loops
  static __attribute__((noinline, cold)) void copy_cut(const uint8_t* p, int64_t left, uint8_t* copy) {
    for (int64_t i = 0; i < block_bytes; i++) copy[i] = i < left ? p[i] : 0;
  }
};

}  // namespace qft::QFT_ISA

// Asking for bytes before they are read. Processors follow one long run of addresses by themselves; a tile reads
// several rows side by side, of codes and of scales, which they follow badly: a core then gets a quarter of the
// bandwidth.
#pragma once

#include "qft/cpu/companions.h"

namespace qft::QFT_ISA {

constexpr int64_t kLine = 64;             // bytes that come together
constexpr int64_t kAheadBytes = 8 << 10;  // of codes between what is read and what is asked for: about a microsecond

// The rows of W some way behind a tile: the tile's share of them, block by block. Past the end of W it asks for what no
// one reads, which does no harm.
class Ahead {
 public:
  Ahead(const Weight& w, const Companion& scales, const Companion& zeros, int64_t first) {
    const int64_t tile_bytes = kTileOutputs * w.row_bytes, steps = blocks(w.in);
    const int64_t row = least(first + kTileOutputs * (1 + kAheadBytes / tile_bytes), w.out);
    codes_ = reinterpret_cast<const char*>(w.codes + row * w.row_bytes);
    scales_ = scales.stored(row);
    zeros_ = zeros.stored(row);
    scale_share_ = kTileOutputs * scales.stored_row() / steps;
    zero_share_ = kTileOutputs * zeros.stored_row() / steps;
  }

  // once a block, of which a tile's codes take `bytes`
  template <int64_t bytes, bool shifted>
  inline __attribute__((always_inline)) void ask() {
#pragma GCC unroll 16
    for (int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch(codes_ + i);
    codes_ += bytes;
    __builtin_prefetch(scales_);
    scales_ += scale_share_;
    if constexpr (shifted) {
      __builtin_prefetch(zeros_);
      zeros_ += zero_share_;
    }
  }

 private:
  const char *codes_, *scales_, *zeros_;
  int64_t scale_share_, zero_share_;
};

// Blocks first .. last - 1 of a row that is read soon.
static inline void ask_for(const Weight& w, const Companion& scales, const Companion& zeros, int64_t row, int64_t first,
                           int64_t last, int64_t block_bytes) {
  const auto ask = [](const char* p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch(p + i);
  };
  ask(reinterpret_cast<const char*>(w.codes) + row * w.row_bytes + first * block_bytes, (last - first) * block_bytes);
  const int64_t whole = blocks(w.in);
  ask(scales.stored(row) + scales.stored_row() * first / whole, scales.stored_row() * (last - first) / whole);
  if (zeros.data)
    ask(zeros.stored(row) + zeros.stored_row() * first / whole, zeros.stored_row() * (last - first) / whole);
}

// Tiles that a thread takes at a time: many, for what it asks for past the last of them is another's, but enough are
// left for all threads to end together.
static inline int64_t tiles_at_a_time(int64_t tiles, int threads) {
  const int64_t share = tiles / (4 * threads);
  return share < 1 ? 1 : share;
}

}  // namespace qft::QFT_ISA

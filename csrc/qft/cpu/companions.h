// Scales and zero points of a weight as fp32. What is stored in fp32 is read where it lies; the rest is decoded a few
// rows at a time, so that the kernels know neither scale kinds nor group sizes.
#pragma once

#include "qft/cpu/arrays.h"

namespace qft::QFT_ISA {

// How the groups of a row map to blocks of 128 codes: 4, 2 or 1 groups a block, or several blocks a group.
struct Grouping {
  int per_block;      // scales a block reads: 1, 2 or 4
  int shift;          // log2 of the blocks in a group, where it is one block or more
  LaneScales spread;  // a block's scales over the lanes in the order of code_at, alike in all its vectors

  explicit Grouping(const Weight& w)
      : per_block(w.group >= kBlock || w.groups == 1 ? 1 : static_cast<int>(kBlock / w.group)),
        shift(0),
        spread(per_block) {
    if (w.groups == 1)
      shift = 62;  // every block reads the row's one scale
    else
      while ((kBlock << shift) < w.group) shift++;
  }

  // first group of block b
  int64_t first(int64_t b) const { return b * per_block >> shift; }
  // group of the 32 codes `sub` of block b
  int64_t of_sub(int64_t b, int sub) const { return (b * per_block >> shift) + sub * per_block / kSubs; }
  // of a row's numbers by group, those of block b, lane by lane
  Vec lanes(const float* row, int64_t b) const { return spread(row + first(b)); }
  // groups that the blocks before `blocks` read, more than the row has where its last block is cut short
  int64_t read_by(int64_t blocks) const { return first(blocks - 1) + per_block; }
};

// The scales or the zero points of a weight; absent zero points read as a null row.
struct Companion {
  const Weight& w;
  const Grouping& grouping;
  const void* data;
  Scale kind;
  bool in_place;

  static Companion scales(const Weight& w, const Grouping& g) { return Companion(w, g, w.scales, w.scale_kind); }
  static Companion zeros(const Weight& w, const Grouping& g) {
    return Companion(w, g, w.zeros, static_cast<Scale>(w.zero_kind));
  }

  // floats of scratch that a row may need
  int64_t row_floats() const { return data && !in_place ? grouping.read_by(blocks(w.in)) : 0; }

  // where row o's numbers are stored, and the bytes that they take
  int64_t stored_row() const { return w.groups * number_bytes(); }
  const char* stored(int64_t o) const { return static_cast<const char*>(data) + o * stored_row(); }
  // bytes of a row before the numbers that block b reads
  int64_t stored_before(int64_t b) const { return grouping.first(b) * number_bytes(); }

  // The row's numbers by group, those that blocks b0 .. b1 - 1 read being valid; `scratch` holds row_floats().
  const float* row(int64_t o, int64_t b0, int64_t b1, float* scratch) const {
    if (!data) return nullptr;
    if (in_place) return static_cast<const float*>(data) + o * w.groups;
    decode(o, b0, b1, scratch);
    return scratch;
  }

 private:
  // In place only where no block of the last row reads past its groups.
  Companion(const Weight& weight, const Grouping& g, const void* numbers, Scale stored)
      : w(weight),
        grouping(g),
        data(numbers),
        kind(stored),
        in_place(stored == Scale::f32 && g.read_by(blocks(w.in)) <= w.groups) {}

  int64_t number_bytes() const { return kind == Scale::f32 ? 4 : kind == Scale::dq ? 1 : 2; }

  // out of line, for it is long and the kernels that call it are many
  __attribute__((noinline)) void decode(int64_t o, int64_t b0, int64_t b1, float* to) const {
    const int64_t first = grouping.first(b0), end = grouping.read_by(b1), last = least(end, w.groups);
    kind == Scale::dq ? decode_dq(o, first, last, to)
                      : read_run(data, o * w.groups + first, last - first, static_cast<Dtype>(kind), to + first, 0);
    for (int64_t g = last; g < end; g++) to[g] = to[last - 1];
  }

  // map[code] * absmax + offset with two roundings, as bitsandbytes decodes it
  void decode_dq(int64_t o, int64_t first, int64_t last, float* to) const {
    const int64_t row = o * w.groups;
    const uint8_t* codes = static_cast<const uint8_t*>(data);
    for (int64_t g = first; g < last;) {
      const float absmax = w.absmax[(row + g) / kDqBlock];
      const int64_t end = least(last, ((row + g) / kDqBlock + 1) * kDqBlock - row);
      for (; g + 16 <= end; g += 16)
        store(to + g, add(mul(gather(w.dynamic_map, codes + row + g), broadcast(absmax)), broadcast(*w.offset)));
      for (; g < end; g++) to[g] = w.dynamic_map[codes[row + g]] * absmax + *w.offset;
    }
  }
};

}  // namespace qft::QFT_ISA

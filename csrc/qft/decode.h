// From packed codes to levels: where a code lies, what it stands for. One text for host, device and run-time builds.
#pragma once

#include "qft/format.h"

namespace qft {

// The levels of a codebook of up to 16 entries, and what encoding derives from them.
struct Codebook {
  float levels[16] = {};     // by code; unused codes stand for 0
  float ascending[16] = {};  // by rank: the distinct levels in ascending order
  float midpoints[16] = {};  // between neighbouring ranks; +inf past the last
  uint8_t code_of_rank[16] = {};
  float anchor = 0;           // the level a group's extreme lands on: the one of largest magnitude
  bool signed_scale = false;  // no level mirrors the anchor, so the scale carries the extreme's sign
  uint8_t zero_code = 0;      // the code nearest 0, for groups of zeros
};

constexpr float kInfinity = __builtin_huge_valf();

constexpr Codebook make_codebook(const float* levels, int count) {
  Codebook book;
  float (&sorted)[16] = book.ascending;
  int ranks = 0;
  for (int code = 0; code < count; code++) {
    const float level = levels[code];
    book.levels[code] = level;
    int at = 0;
    while (at < ranks && sorted[at] < level) at++;
    if (at < ranks && sorted[at] == level) continue;  // fp4 spells zero twice: the first code is the one written
    for (int i = ranks; i > at; i--) {
      sorted[i] = sorted[i - 1];
      book.code_of_rank[i] = book.code_of_rank[i - 1];
    }
    sorted[at] = level;
    book.code_of_rank[at] = static_cast<uint8_t>(code);
    ranks++;
  }
  for (int i = 0; i < 16; i++) book.midpoints[i] = i + 1 < ranks ? (sorted[i] + sorted[i + 1]) / 2 : kInfinity;
  const float low = sorted[0], high = sorted[ranks - 1];
  book.anchor = -low > high ? low : high;
  book.signed_scale = -low != high;
  int nearest = 0;
  for (int i = 1; i < ranks; i++) {
    const float a = sorted[i] < 0 ? -sorted[i] : sorted[i],
                b = sorted[nearest] < 0 ? -sorted[nearest] : sorted[nearest];
    if (a < b) nearest = i;
  }
  book.zero_code = book.code_of_rank[nearest];
  return book;
}

// Symmetric integers are a codebook of consecutive levels; up to 4 bits they decode like any other.
template <int bits>
constexpr Codebook integer_codebook(bool zero) {
  constexpr int count = bits <= 4 ? 1 << bits : 1;
  float levels[16] = {};
  for (int i = 0; i < count; i++) levels[i] = static_cast<float>(zero ? i : i - (1 << (bits - 1)));
  return make_codebook(levels, count);
}

// Vector kernels decode 128 codes into 8 vectors of 16 lanes: lane l of vector v holds the code at this offset. A
// lane's 8 codes lie side by side in one 32-bit word (of bytes, 16-bit words or nibbles for 1, 2 or 3 bits), so a shift
// brings each to the bottom of its lane, and four lanes share a scale in every vector alike. Activations are permuted
// once per call to match, so no shuffle is paid per code.
constexpr int code_at(int v, int l) { return 8 * l + v; }

// bits between neighbouring codes of such a word: 3-bit codes come as nibbles
constexpr int code_stride(int bits) { return bits == 3 ? 4 : bits; }

}  // namespace qft

// Reading packed rows on the device: eight codes at a time, one per nibble, whatever the width; and the scale and zero
// point of a group, as fp32.
#pragma once

#include "qft/cuda/launch.cuh"
#include "qft/cuda/numbers.cuh"

namespace qft::QFT_ISA {

constexpr int kRecord = 32;  // codes whose storage stands alone: 4 * bits bytes

// Eight codes of fewer than 8 bits, one per nibble, the first in the lowest; `octet` of 0..3 within a record, whose
// words `word(i)` reads.
template <int bits, class Word>
__device__ __forceinline__ uint32_t nibbles(Word word, int octet) {
  static_assert(bits >= 1 && bits <= 4);
  if constexpr (bits == 4) {
    return word(octet);
  } else if constexpr (bits == 3) {  // the spare bits of three nibble words are the bit planes of the fourth octet
    if (octet < 3) return word(octet) & 0x77777777u;
    return (word(0) >> 3 & 0x11111111u) | (word(1) >> 2 & 0x22222222u) | (word(2) >> 1 & 0x44444444u);
  } else if constexpr (bits == 2) {
    uint32_t codes = word(octet >> 1) >> (octet & 1) * 16 & 0xffffu;
    codes = (codes | codes << 8) & 0x00ff00ffu;
    codes = (codes | codes << 4) & 0x0f0f0f0fu;
    return (codes | codes << 2) & 0x33333333u;
  } else {
    uint32_t codes = word(0) >> octet * 8 & 0xffu;
    codes = (codes | codes << 12) & 0x000f000fu;
    codes = (codes | codes << 6) & 0x03030303u;
    return (codes | codes << 3) & 0x11111111u;
  }
}

// Scale of group g of row o, as fp32. Double-quantized: map[code] * absmax + offset with two roundings, as bitsandbytes
// decodes it; `dynamic_map` may be a copy in shared memory.
__device__ __forceinline__ float scale_at(const Weight& w, const float* dynamic_map, int64_t o, int64_t g) {
  const int64_t at = o * w.groups + g;
  if (w.scale_kind == Scale::dq) {
    const uint8_t code = static_cast<const uint8_t*>(w.scales)[at];
    return __fadd_rn(__fmul_rn(dynamic_map[code], w.absmax[at / kDqBlock]), *w.offset);
  }
  return read(w.scales, at, static_cast<Dtype>(w.scale_kind));
}

// Zero point of group g of row o, as fp32; 0 for formats without.
__device__ __forceinline__ float zero_at(const Weight& w, int64_t o, int64_t g) {
  return w.zeros ? read(w.zeros, o * w.groups + g, w.zero_kind) : 0.0f;
}

}  // namespace qft::QFT_ISA

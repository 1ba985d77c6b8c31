// Writing packed rows on the device: a record of 32 codes to a lane, the reverse of octets.cuh.
#pragma once

#include "qft/cuda/octets.cuh"
#include "qft/encode.h"

namespace qft::QFT_ISA {

// Codes of a record in the words they are gathered in: one per nibble, or one per byte at 8 bits.
template <int bits>
struct Record {
  static constexpr int width = bits == 8 ? 8 : 4, per_word = 32 / width, count = kRecord / per_word;
  uint32_t words[count] = {};

  __device__ __forceinline__ void set(int k, uint32_t code) { words[k / per_word] |= code << width * (k % per_word); }

  // codes from `left` on become 0
  __device__ __forceinline__ void cut(int64_t left) {
    if (left >= kRecord) return;
    for (int i = 0; i < count; i++) {
      const int kept = static_cast<int>(left) - i * per_word;
      if (kept < per_word) words[i] &= kept <= 0 ? 0 : (1u << width * kept) - 1;
    }
  }
};

// Stores record `at` of a row, which has a code of it; the row's last one may be cut short by the row's end, 8-bit
// codes alone. What lies between the row's last record and its end becomes 0: less than 16 bytes.
template <int bits>
__device__ __forceinline__ void store_record(uint8_t* row, int64_t at, const Record<bits>& record, bool last,
                                             int64_t row_bytes) {
  const uint32_t* words = record.words;
  const int64_t end = (at + 1) * (4 * bits);
  uint32_t* to = reinterpret_cast<uint32_t*>(row + at * (4 * bits));
  if constexpr (bits == 8) {
    reinterpret_cast<uint4*>(to)[0] = make_uint4(words[0], words[1], words[2], words[3]);
    if (end <= row_bytes) reinterpret_cast<uint4*>(to)[1] = make_uint4(words[4], words[5], words[6], words[7]);
  } else if constexpr (bits == 4) {
    reinterpret_cast<uint4*>(to)[0] = make_uint4(words[0], words[1], words[2], words[3]);
  } else if constexpr (bits == 3) {  // the spare bits of three nibble words are the bit planes of the fourth octet
    for (int i = 0; i < 3; i++) to[i] = words[i] | (words[3] >> i & 0x11111111u) << 3;
  } else if constexpr (bits == 2) {
    reinterpret_cast<uint2*>(to)[0] = make_uint2(pack_pairs(words[0]) | pack_pairs(words[1]) << 16,
                                                 pack_pairs(words[2]) | pack_pairs(words[3]) << 16);
  } else {
    to[0] = pack_bits(words[0]) | pack_bits(words[1]) << 8 | pack_bits(words[2]) << 16 | pack_bits(words[3]) << 24;
  }
  if (last)
    for (int64_t i = end; i < row_bytes; i += 4) *reinterpret_cast<uint32_t*>(row + i) = 0;
}

}  // namespace qft::QFT_ISA

// Packing codes: 32 of them, one per byte, into their storage. One text for host, device and run-time builds; a host
// with BMI2 has one instruction for what the others do in three steps.
#pragma once

#include "qft/format.h"

namespace qft {

// 8 codes below 16, one per byte of `bytes` -> 8 nibbles
static inline uint32_t pack_nibbles(uint64_t bytes) {
#ifdef __BMI2__
  return static_cast<uint32_t>(__builtin_ia32_pext_di(bytes, 0x0f0f0f0f0f0f0f0full));
#endif
  bytes = (bytes | bytes >> 4) & 0x00ff00ff00ff00ffull;
  bytes = (bytes | bytes >> 8) & 0x0000ffff0000ffffull;
  return static_cast<uint32_t>(bytes | bytes >> 16);
}

// 8 nibbles below 4 -> 16 bits; below 2 -> 8 bits
QFT_HOST_DEVICE static inline uint32_t pack_pairs(uint32_t nibbles) {
#ifdef __BMI2__
  return __builtin_ia32_pext_si(nibbles, 0x33333333u);
#endif
  nibbles = (nibbles | nibbles >> 2) & 0x0f0f0f0fu;
  nibbles = (nibbles | nibbles >> 4) & 0x00ff00ffu;
  return (nibbles | nibbles >> 8) & 0xffffu;
}
QFT_HOST_DEVICE static inline uint32_t pack_bits(uint32_t nibbles) {
#ifdef __BMI2__
  return __builtin_ia32_pext_si(nibbles, 0x11111111u);
#endif
  nibbles = (nibbles | nibbles >> 3) & 0x03030303u;
  nibbles = (nibbles | nibbles >> 6) & 0x000f000fu;
  return (nibbles | nibbles >> 12) & 0xffu;
}

static inline void store_word(uint8_t* to, uint32_t word, int bytes) {
  for (int i = 0; i < bytes; i++) to[i] = static_cast<uint8_t>(word >> (8 * i));
}

// 32 codes, one per byte -> bits * 4 bytes
template <int bits>
static inline void pack32(const uint8_t* codes, uint8_t* to) {
  if constexpr (bits == 8) {
    for (int i = 0; i < 32; i++) to[i] = codes[i];
  } else {
    uint32_t octet[4];
    for (int i = 0; i < 4; i++) {
      uint64_t bytes = 0;
      for (int j = 0; j < 8; j++) bytes |= static_cast<uint64_t>(codes[8 * i + j]) << (8 * j);
      octet[i] = pack_nibbles(bytes);
    }
    if constexpr (bits == 4) {
      for (int i = 0; i < 4; i++) store_word(to + 4 * i, octet[i], 4);
    } else if constexpr (bits == 3) {
      // three nibble words; the spare top bit of each nibble spells the fourth group of eight, one bit plane a word
      for (int i = 0; i < 3; i++) store_word(to + 4 * i, octet[i] | ((octet[3] >> i) & 0x11111111u) << 3, 4);
    } else if constexpr (bits == 2) {
      for (int i = 0; i < 4; i++) store_word(to + 2 * i, pack_pairs(octet[i]), 2);
    } else {
      for (int i = 0; i < 4; i++) store_word(to + i, pack_bits(octet[i]), 1);
    }
  }
}

}  // namespace qft

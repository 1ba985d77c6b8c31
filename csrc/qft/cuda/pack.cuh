// Writing packed rows on the device: eight codes a lane, the reverse of octets.cuh.
#pragma once

#include "qft/cuda/octets.cuh"
#include "qft/cuda/warps.cuh"

namespace qft::QFT_ISA {

// Bytes of a row that octets of codes fill; padding follows.
template <int bits>
__host__ __device__ constexpr int64_t octet_bytes(int64_t in) {
  return bits == 3 ? (in + kRecord - 1) / kRecord * 12 : (in + 7) / 8 * bits;
}

// Stores the octet of `column` where that lies before `end`: `words` has its codes one per nibble, or one per byte at 8
// bits. Called by the whole warp, four lanes to a record in order: at 3 bits they exchange the fourth octet, whose bit
// planes are the spare bits of the other three.
template <int bits, int count>
__device__ __forceinline__ void store_octet(uint8_t* row, int64_t column, const uint32_t (&words)[count], int64_t end) {
  const bool inside = column < end;
  const uint64_t at = static_cast<uint64_t>(column) / 8;
  uint32_t codes = words[0];
  if constexpr (bits == 8) {
    if (inside) reinterpret_cast<uint2*>(row)[at] = make_uint2(words[0], words[1]);
  } else if constexpr (bits == 4) {
    if (inside) reinterpret_cast<uint32_t*>(row)[at] = codes;
  } else if constexpr (bits == 3) {
    const unsigned octet = at % 4;
    const uint32_t fourth = __shfl_sync(kAllLanes, codes, lane_of_warp() | 3);
    if (octet < 3 && column - octet * 8 < end)
      reinterpret_cast<uint32_t*>(row)[at / 4 * 3 + octet] = codes | (fourth >> octet & 0x11111111u) << 3;
  } else if constexpr (bits == 2) {
    codes = (codes | codes >> 2) & 0x0f0f0f0fu;
    codes = (codes | codes >> 4) & 0x00ff00ffu;
    if (inside) reinterpret_cast<uint16_t*>(row)[at] = static_cast<uint16_t>(codes | codes >> 8);
  } else {
    codes = (codes | codes >> 3) & 0x03030303u;
    codes = (codes | codes >> 6) & 0x000f000fu;
    if (inside) row[at] = static_cast<uint8_t>(codes | codes >> 12);
  }
}

}  // namespace qft::QFT_ISA

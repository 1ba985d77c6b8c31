// From packed codes to fp32 levels: eight codes (an octet) as they lie in memory, and the tables, copied to shared
// memory, that say what codes stand for. 16 levels lie in 16 banks and equal codes are one broadcast: no lookup waits.
#pragma once

#include "qft/cuda/code.cuh"
#include "qft/cuda/octets.cuh"

namespace qft::QFT_ISA {

constexpr int kOctet = 8;  // codes that one lane takes at a time

struct SharedTables {
  float level[16];
  float dynamic_map[256];  // of double-quantized scales
};

// By all threads of the block, which then may read the tables.
__device__ __forceinline__ void fill_tables(SharedTables& tables, const LevelTable& levels, const Weight& w) {
  for (unsigned code = 0; code < 16; code++)  // no index by a register: it would put a copy on the stack
    if (threadIdx.x == code) tables.level[code] = levels.level[code];
  if (w.scale_kind == Scale::dq)
    for (unsigned i = threadIdx.x; i < 256; i += blockDim.x) tables.dynamic_map[i] = w.dynamic_map[i];
  __syncthreads();
}

// The words that hold an octet; three for 3-bit codes, whose fourth octet lies in the spare bits of the other three.
template <int bits>
struct Octet {
  uint32_t words[bits == 8 ? 2 : bits == 3 ? 3 : 1];
};

// Where an octet lies: its record of 32 codes, and which of the four it is.
struct OctetPlace {
  const uint8_t* record;
  int octet;
};

// Of a column, any of the octet's.
template <int bits>
__device__ __forceinline__ OctetPlace place_of(const uint8_t* row, int64_t column) {
  const uint64_t at = static_cast<uint64_t>(column);  // divides by a shift
  return {row + at / kRecord * (4 * bits), static_cast<int>(at / kOctet % 4)};
}

// Only loads, so that several octets are under way before one is decoded. `records` on from the place: constants keep
// 64-bit arithmetic out of unrolled loops. An octet that has a code of the row lies whole within the row's bytes.
template <int bits>
__device__ __forceinline__ Octet<bits> load_octet(OctetPlace place, int records = 0) {
  const uint32_t* record = reinterpret_cast<const uint32_t*>(place.record + records * (4 * bits));
  Octet<bits> codes;
  if constexpr (bits == 8) {
    const uint2 both = reinterpret_cast<const uint2*>(record)[place.octet];
    codes.words[0] = both.x;
    codes.words[1] = both.y;
  } else if constexpr (bits == 3) {
    for (int i = 0; i < 3; i++) codes.words[i] = record[i];
  } else {
    codes.words[0] = record[place.octet * bits / 4];
  }
  return codes;
}

// Zero point of group g of row o, as fp32; a plain 0 where the codes have none.
template <class F>
__device__ __forceinline__ float zero_of(const Weight& w, int64_t o, int64_t g) {
  if constexpr (F::may_have_zeros) return zero_at(w, o, g);
  return 0;
}

// Levels of codes first .. first + count - 1 of an octet, the `octet`-th of its record: the whole of it, or the half
// that starts at 0 or 4. Words are chosen, never indexed by a register: that would put them on the stack.
template <class F, int count>
__device__ __forceinline__ void decode(const Octet<F::bits>& codes, int octet, int first, const Weight& w,
                                       const SharedTables& tables, float (&levels)[count]) {
  if constexpr (F::bits == 8) {
    const float base = w.zeros ? 0x1p23f : 0x1p23f + 128;  // 2^23 + code is exact: its low byte is the code
    for (int i = 0; i < count; i++) {
      const uint32_t word = count == kOctet ? codes.words[i / 4] : first == 0 ? codes.words[0] : codes.words[1];
      levels[i] = __uint_as_float(0x4b000000u | (word >> 8 * (i % 4) & 0xffu)) - base;
    }
  } else {
    const auto word = [&](int i) {
      if constexpr (F::bits == 3) return i == 0 ? codes.words[0] : i == 1 ? codes.words[1] : codes.words[2];
      return codes.words[0];
    };
    const uint32_t nibble = nibbles<F::bits>(word, octet) >> 4 * first;
    for (int i = 0; i < count; i++) levels[i] = tables.level[nibble >> 4 * i & 15];
  }
}

}  // namespace qft::QFT_ISA

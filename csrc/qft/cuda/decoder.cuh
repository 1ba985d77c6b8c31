// Decoding in registers: eight codes of a packed row become four registers of two levels each, in the activations' type
// and in the order of the row. An OctetReader fetches, a decoder's `eight` decodes; a thread makes one of each.
#pragma once

#include <type_traits>

#include "qft/cuda/code.cuh"
#include "qft/cuda/octets.cuh"
#include "qft/cuda/ptx.cuh"

namespace qft::QFT_ISA {

// T is __nv_bfloat16 or __half; both take 16 bits, and two of them a register.
template <class T>
constexpr bool is_bf16 = std::is_same_v<T, __nv_bfloat16>;

template <class T>
__device__ __forceinline__ uint32_t bits_of(T value) {
  return *reinterpret_cast<const uint16_t*>(&value);
}

// Both halves of a register at once, each rounded to T.
template <class T>
__device__ __forceinline__ uint32_t add_halves(uint32_t a, uint32_t b) {
  using Two = std::conditional_t<is_bf16<T>, __nv_bfloat162, __half2>;
  const Two sum = __hadd2(*reinterpret_cast<const Two*>(&a), *reinterpret_cast<const Two*>(&b));
  return *reinterpret_cast<const uint32_t*>(&sum);
}

// (a & b) | c in one instruction
__device__ __forceinline__ uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) { return ptx::lop3<0xEA>(a, b, c); }

// Reads the eight codes of octet 0..3 of a record in shared memory, one per nibble. A reader is made for one octet: the
// lanes of a warp hold different ones and must not part ways. It reads from `start` bytes into the record on. `packed`:
// as they are stored instead, the first code lowest.
template <int bits, bool packed = false>
struct OctetReader;

template <>
struct OctetReader<1> {
  static constexpr int start = 0;
  int octet;
  __device__ __forceinline__ explicit OctetReader(int octet_) : octet(octet_) {}
  __device__ __forceinline__ uint32_t operator()(const char* record) const {
    return nibbles<1>([&](int word) { return reinterpret_cast<const uint32_t*>(record)[word]; }, octet);
  }
};

// As nibbles<2>, with the first spreading step, to a byte between the bytes, by PRMT.
template <>
struct OctetReader<2> {
  int start;
  uint32_t half;  // selector: the two bytes of this octet, zeros between
  __device__ __forceinline__ explicit OctetReader(int octet)
      : start(octet / 2 * 4), half(octet % 2 ? 0x4342 : 0x4140) {}
  __device__ __forceinline__ uint32_t operator()(const char* word) const {
    uint32_t codes = ptx::prmt(*reinterpret_cast<const uint32_t*>(word), 0, half);
    codes = (codes | codes << 4) & 0x0f0f0f0fu;
    return (codes | codes << 2) & 0x33333333u;
  }
};

// Octets 0..2 are the low three bits of one word's nibbles, octet 3 is the spare bit of all three words (nibbles<3>):
// the same three shifts and masks serve both.
template <>
struct OctetReader<3> {
  static constexpr int start = 0;
  int word, shift;
  uint32_t own, second, third;  // masks of the bits that word `word`, word 1 and word 2 give
  __device__ __forceinline__ explicit OctetReader(int octet)
      : word(octet < 3 ? octet : 0),
        shift(octet < 3 ? 0 : 3),
        own(octet < 3 ? 0x77777777u : 0x11111111u),
        second(octet < 3 ? 0 : 0x22222222u),
        third(octet < 3 ? 0 : 0x44444444u) {}
  __device__ __forceinline__ uint32_t operator()(const char* record) const {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(record);
    return and_or(words[2] >> 1, third, and_or(words[1] >> 2, second, words[word] >> shift & own));
  }
};

template <>
struct OctetReader<2, true> {
  int start;
  __device__ __forceinline__ explicit OctetReader(int octet) : start(octet * 2) {}
  __device__ __forceinline__ uint32_t operator()(const char* half) const {
    return *reinterpret_cast<const uint16_t*>(half);
  }
};

template <bool packed>
struct OctetReader<4, packed> {  // nibbles are how they are stored
  int start;
  __device__ __forceinline__ explicit OctetReader(int octet) : start(octet * 4) {}
  __device__ __forceinline__ uint32_t operator()(const char* word) const {
    return *reinterpret_cast<const uint32_t*>(word);
  }
};

// Eight bytes: codes of 8 bits are not squeezed into nibbles.
template <>
struct OctetReader<8> {
  int start;
  __device__ __forceinline__ explicit OctetReader(int octet) : start(octet * 8) {}
  __device__ __forceinline__ uint2 operator()(const char* words) const {
    return *reinterpret_cast<const uint2*>(words);
  }
};

// Four low bytes and four high bytes of levels become two registers of two levels.
__device__ __forceinline__ void interleave(uint32_t low, uint32_t high, uint32_t& first, uint32_t& second) {
  first = ptx::prmt(low, high, 0x5140);
  second = ptx::prmt(low, high, 0x7362);
}

// Looks up to 16 levels up by PRMT: the low bytes of all levels in `levels / 4` registers, the high bytes in as many.
// The registers are filled through shared memory: taken straight from the kernel's arguments they would stay in uniform
// registers, and each PRMT would cost a move.
template <class T, int levels>
struct BytePlanes {
  static_assert(levels == 8 || levels == 16);
  static constexpr bool packed = false;
  static constexpr int planes = levels / 4;
  static constexpr int table_bytes = 2 * planes * 4;
  uint32_t low[planes], high[planes];

  // by all threads of a block; a barrier must follow
  __device__ __forceinline__ static void fill(const LevelTable& book, uint32_t* table) {
    for (int i = threadIdx.x; i < 2 * planes; i += blockDim.x) {
      uint32_t word = 0;
      for (int byte = 0; byte < 4; byte++)
        word |= (bits_of(from_float<T>(book.level[i % planes * 4 + byte])) >> i / planes * 8 & 0xff) << 8 * byte;
      table[i] = word;
    }
  }
  __device__ __forceinline__ explicit BytePlanes(const uint32_t* table) {
    for (int i = 0; i < planes; i++) low[i] = table[i], high[i] = table[planes + i];
  }
  __device__ __forceinline__ void eight(uint32_t codes, uint32_t (&pairs)[4]) const {
    if constexpr (levels == 8) {
      interleave(ptx::prmt(low[0], low[1], codes), ptx::prmt(high[0], high[1], codes), pairs[0], pairs[1]);
      codes >>= 16;
      interleave(ptx::prmt(low[0], low[1], codes), ptx::prmt(high[0], high[1], codes), pairs[2], pairs[3]);
    } else {  // look in levels 0..7 and in levels 8..15, then choose by bit 3 of the code
      const uint32_t in_half = codes & 0x77777777u, choice = and_or(codes >> 1, 0x44444444u, 0x32103210u);
      interleave(look(low, in_half, choice), look(high, in_half, choice), pairs[0], pairs[1]);
      interleave(look(low, in_half >> 16, choice >> 16), look(high, in_half >> 16, choice >> 16), pairs[2], pairs[3]);
    }
  }

 private:
  __device__ __forceinline__ static uint32_t look(const uint32_t (&plane)[planes], uint32_t in_half, uint32_t choice) {
    return ptx::prmt(ptx::prmt(plane[0], plane[1], in_half), ptx::prmt(plane[2], plane[3], in_half), choice);
  }
};

// Looks two levels up at once: two packed codes -> both levels, in shared memory, one copy of the table per bank, so
// that no two lanes collide.
template <class T, int bits>
struct PairTable {
  static constexpr bool packed = true;
  static constexpr int entries = 1 << 2 * bits;
  static constexpr int entry_bytes = 4 * kWarp;
  static constexpr int table_bytes = entries * entry_bytes;
  const char* table;
  uint32_t column;  // this lane's bank: bytes from the start of an entry

  __device__ __forceinline__ static void fill(const LevelTable& book, uint32_t* table) {
    for (int i = threadIdx.x; i < table_bytes / 16; i += blockDim.x) {
      const int codes = i / (entry_bytes / 16);
      const uint32_t pair = bits_of(from_float<T>(book.level[codes >> bits])) << 16 |
                            bits_of(from_float<T>(book.level[codes & ((1 << bits) - 1)]));
      reinterpret_cast<uint4*>(table)[i] = make_uint4(pair, pair, pair, pair);
    }
  }
  __device__ __forceinline__ explicit PairTable(const uint32_t* filled)
      : table(reinterpret_cast<const char*>(filled)), column(threadIdx.x % kWarp * 4) {}
  __device__ __forceinline__ void eight(uint32_t codes, uint32_t (&pairs)[4]) const {
    constexpr int log2_entry = 7;
    static_assert(entry_bytes == 1 << log2_entry);
    for (int i = 0; i < 4; i++) {
      const int right = 2 * bits * i - log2_entry;
      const uint32_t shifted = right < 0 ? codes << -right : codes >> right;
      pairs[i] = *reinterpret_cast<const uint32_t*>(table + and_or(shifted, (entries - 1u) << log2_entry, column));
    }
  }
};

// Integers are computed: no table. Codes count from the middle of their range, whether the format has zero points or
// not: its kernels subtract the middle from the zero point instead.
struct Computed {
  static constexpr bool packed = false;
  static constexpr int table_bytes = 0;
  __device__ __forceinline__ static void fill(const LevelTable&, uint32_t*) {}
  __device__ __forceinline__ explicit Computed(const uint32_t*) {}
};

// code - 8: the code becomes the low mantissa bits of a number whose unit is 1, then the rest of that number is
// subtracted. bf16: 128 + code - 136; fp16: 1024 + code - 1032. Exact.
template <class T>
struct FourBitIntegers : Computed {
  using Computed::Computed;
  __device__ __forceinline__ void eight(uint32_t codes, uint32_t (&pairs)[4]) const {
    constexpr uint32_t base = is_bf16<T> ? 0x43004300u : 0x64006400u, rest = is_bf16<T> ? 0xc308c308u : 0xe408e408u;
    const uint32_t odd = codes >> 4;
    for (int i = 0; i < 4; i++) {
      const uint32_t bytes = ptx::prmt(codes, odd, 0x4400u + 0x1111u * i);  // twice byte i of each
      pairs[i] = add_halves<T>(and_or(bytes, 0x000f000fu, base), rest);
    }
  }
};

// code - 128. fp16 as above: 1024 + code - 1152. bf16 has 7 mantissa bits: 128 + the low seven, less 256 or, where the
// eighth is set, 128. Exact.
template <class T>
struct EightBitIntegers : Computed {
  using Computed::Computed;
  __device__ __forceinline__ void eight(uint2 codes, uint32_t (&pairs)[4]) const {
    for (int i = 0; i < 4; i++) {
      const uint32_t word = i < 2 ? codes.x : codes.y;
      const uint32_t raised = ptx::prmt(word, is_bf16<T> ? 0x43434343u : 0x64646464u, i % 2 ? 0x4342 : 0x4140);
      if constexpr (is_bf16<T>)
        pairs[i] = add_halves<T>(raised & 0xff7fff7fu, ptx::lop3<0x6A>(raised, 0x00800080u, 0xc380c380u));  // (a&b)^c
      else
        pairs[i] = add_halves<T>(raised, 0xe480e480u);
    }
  }
};

// The decoder of a format; `pair_table` chooses between the two that levels of 2 and 4 bits have.
template <class F, class T, bool pair_table = false>
using Decoder = std::conditional_t<
    F::kind == Levels::integer && F::bits == 8, EightBitIntegers<T>,
    std::conditional_t<F::kind == Levels::integer && F::bits == 4, FourBitIntegers<T>,
                       std::conditional_t<pair_table, PairTable<T, F::bits>, BytePlanes<T, (F::bits == 4 ? 16 : 8)>>>>;

}  // namespace qft::QFT_ISA

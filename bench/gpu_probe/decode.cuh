// Ways to turn packed codes into pairs of bf16, behind one interface: `eight(words, i)` decodes the i-th eight codes of
// a unit. Which codes those are is the decoder's choice: gpu_probe.py knows, and checks every decoder before timing it.
#pragma once
#include "probe.h"
#include "ptx.cuh"

struct Eight {
  uint32_t pair[4];  // two bf16 each
};

// Four looked-up low bytes and four high bytes become two registers of two bf16.
HOST_DEVICE void interleave(uint32_t low, uint32_t high, uint32_t& first, uint32_t& second) {
  first = ptx::prmt(low, high, 0x5140);
  second = ptx::prmt(low, high, 0x7362);
}

struct FourBits {
  static constexpr int vectors = 1, eights = 4;  // of a unit: 16-byte vectors, and groups of eight codes
};

struct NoTable {
  static constexpr int table_bytes = 0;
  HOST_DEVICE static void fill(const uint16_t*, uint32_t*, int, int) {}
};

// The low bytes of 16 levels in four words, the high bytes in four more. Through shared memory: straight from the
// kernel's arguments they stay in uniform registers, and each PRMT costs a move (seen: 123 moves for 128 codes).
struct BytePlanes {
  static constexpr int table_bytes = 32;
  uint32_t low[4], high[4];
  HOST_DEVICE explicit BytePlanes(const uint32_t* filled) {
    for (int i = 0; i < 4; i++) low[i] = filled[i], high[i] = filled[4 + i];
  }
  HOST_DEVICE static void fill(const uint16_t* levels, uint32_t* table, int thread, int threads) {
    for (int word = thread; word < 8; word += threads) {
      table[word] = 0;
      for (int i = 0; i < 4; i++) table[word] |= uint32_t(levels[word % 4 * 4 + i] >> (word / 4 * 8) & 0xff) << (8 * i);
    }
  }
  HOST_DEVICE Eight up_to_8_levels(uint32_t code) const {
    Eight out;
    const uint32_t rest = code >> 16;
    interleave(ptx::prmt(low[0], low[1], code), ptx::prmt(high[0], high[1], code), out.pair[0], out.pair[1]);
    interleave(ptx::prmt(low[0], low[1], rest), ptx::prmt(high[0], high[1], rest), out.pair[2], out.pair[3]);
    return out;
  }
};

// No decoding: what the loads and the consumer alone allow.
struct Raw : FourBits, NoTable {
  HOST_DEVICE Raw(const uint16_t*, const uint32_t*, int) {}
  HOST_DEVICE Eight eight(const uint32_t* words, int) const { return {{words[0], words[1], words[2], words[3]}}; }
};

// Any 16 levels: per byte plane look in levels 0-7, in levels 8-15, and choose by bit 3 of the code.
struct Nf4Prmt : FourBits, BytePlanes {
  HOST_DEVICE Nf4Prmt(const uint16_t*, const uint32_t* filled, int) : BytePlanes(filled) {}
  HOST_DEVICE static uint32_t look(const uint32_t (&plane)[4], uint32_t code, uint32_t choose) {
    return ptx::prmt(ptx::prmt(plane[0], plane[1], code), ptx::prmt(plane[2], plane[3], code), choose);
  }
  HOST_DEVICE Eight eight(const uint32_t* words, int i) const {
    const uint32_t code = words[i] & 0x77777777u;
    const uint32_t choose = ptx::and_or(words[i] >> 1, 0x44444444u, 0x32103210u);
    Eight out;
    interleave(look(low, code, choose), look(high, code, choose), out.pair[0], out.pair[1]);
    interleave(look(low, code >> 16, choose >> 16), look(high, code >> 16, choose >> 16), out.pair[2], out.pair[3]);
    return out;
  }
};

// 8 levels, 32 codes in three words: a nibble holds 3 bits, and the spare bits of the three words spell eight more
// codes.
struct Nf3Prmt : BytePlanes {
  static constexpr int vectors = 3, eights = 16;
  HOST_DEVICE Nf3Prmt(const uint16_t*, const uint32_t* filled, int) : BytePlanes(filled) {}
  HOST_DEVICE Eight eight(const uint32_t* words, int i) const {
    const uint32_t* three = words + i / 4 * 3;
    if (i % 4 < 3) return up_to_8_levels(three[i % 4] & 0x77777777u);
    const uint32_t first_bits = three[0] >> 3 & 0x11111111u;
    const uint32_t two_bits = ptx::and_or(three[1] >> 2, 0x22222222u, first_bits);
    return up_to_8_levels(ptx::and_or(three[2] >> 1, 0x44444444u, two_bits));
  }
};

// 4 levels, 16 codes a word: the even codes of a word, then the odd ones.
struct Nf2Prmt : BytePlanes {
  static constexpr int vectors = 1, eights = 8;
  HOST_DEVICE Nf2Prmt(const uint16_t*, const uint32_t* filled, int) : BytePlanes(filled) {}
  HOST_DEVICE Eight eight(const uint32_t* words, int i) const {
    return up_to_8_levels(words[i / 2] >> (i % 2 * 2) & 0x33333333u);
  }
};

// A byte holds two codes: a table of all 256 pairs, one copy per bank, answers both in one read. See PairTable.
template <int stride>
struct Nf4Pair : FourBits {
  static constexpr int table_bytes = 256 * stride;
  const char* table;
  uint32_t lane4;
  HOST_DEVICE Nf4Pair(const uint16_t*, const uint32_t* filled, int lane)
      : table(reinterpret_cast<const char*>(filled)), lane4(lane * 4) {}
  HOST_DEVICE static void fill(const uint16_t* levels, uint32_t* table, int thread, int threads) {
    for (int i = thread; i < 256 * 32; i += threads) {
      const int byte = i / 32;
      table[byte * (stride / 4) + i % 32] = uint32_t(levels[byte / 16]) << 16 | levels[byte % 16];
    }
  }
  HOST_DEVICE uint32_t address(uint32_t word, int byte) const {
    if (stride == 256) return ptx::prmt(word, lane4, 0x5504 | byte << 4);
    return ptx::and_or(byte == 0 ? word << 7 : word >> (8 * byte - 7), 0x7f80u, lane4);
  }
  HOST_DEVICE Eight eight(const uint32_t* words, int i) const {
    Eight out;
    for (int byte = 0; byte < 4; byte++)
      out.pair[byte] = *reinterpret_cast<const uint32_t*>(table + address(words[i], byte));
    return out;
  }
};

// The codebook lies spread over the lanes; each code fetches its level with a warp shuffle.
struct Nf4Shuffle : FourBits, NoTable {
  float mine, codebook[16];  // the codebook is the host's way only
  HOST_DEVICE Nf4Shuffle(const uint16_t* levels, const uint32_t*, int lane) {
    for (int i = 0; i < 16; i++) codebook[i] = __bfloat162float(ptx::pair(levels[i]).x);
    mine = __bfloat162float(ptx::pair(levels[lane % 16]).x);
  }
  HOST_DEVICE Eight eight(const uint32_t* words, int i) const {
    Eight out;
    for (int k = 0; k < 4; k++) {
      const float first = ptx::shuffle(mine, codebook, words[i] >> (8 * k) & 15);
      const float second = ptx::shuffle(mine, codebook, words[i] >> (8 * k + 4) & 15);
      out.pair[k] = ptx::bits(__floats2bfloat162_rn(first, second));
    }
    return out;
  }
};

// Affine integers, code - 8: the code becomes the mantissa of 128 + code; codes k and k + 4 of a word share a register.
struct Int4Lop3 : FourBits, NoTable {
  HOST_DEVICE Int4Lop3(const uint16_t*, const uint32_t*, int) {}
  HOST_DEVICE Eight eight(const uint32_t* words, int i) const {
    Eight out;
    for (int k = 0; k < 4; k++) {
      const uint32_t shifted = ptx::and_or(words[i] >> (4 * k), 0x000f000fu, 0x43004300u);
      out.pair[k] = ptx::bits(__hsub2(ptx::pair(shifted), ptx::pair(0x43084308u)));  // 128 + code - 136
    }
    return out;
  }
};

// Consumers. Tensor cores: what a matrix kernel does with the registers, on no pipe that a decoder uses.
struct FeedTensorCores {
  float sum[2][4] = {};
  uint32_t ones[2] = {0x3f803f80u, 0x3f803f80u};
  __device__ explicit FeedTensorCores(const Decode&) {}
  __device__ void take(uint32_t, int i, int, const Eight& eight) { ptx::mma_bf16(sum[i % 2], eight.pair, ones); }
  __device__ void finish(const Decode& args) const {
    static_cast<float*>(args.sink)[blockIdx.x * THREADS + threadIdx.x] = sum[0][0] + sum[0][3] + sum[1][0] + sum[1][3];
  }
};

// Memory: for comparison with the reference.
struct Store {
  uint32_t* decoded;
  HOST_DEVICE explicit Store(const Decode& args) : decoded(static_cast<uint32_t*>(args.decoded)) {}
  HOST_DEVICE void take(uint32_t unit, int i, int eights, const Eight& eight) {
    memcpy(decoded + (size_t(unit) * eights + i) * 4, eight.pair, 16);
  }
  HOST_DEVICE void finish(const Decode&) const {}
};

template <int vectors>
HOST_DEVICE void load_unit(uint32_t (&words)[4 * vectors], const void* packed, uint32_t unit) {
  const uint4* from = static_cast<const uint4*>(packed) + size_t(unit) * vectors;
  for (int v = 0; v < vectors; v++) {
#ifdef __CUDA_ARCH__
    const uint4 loaded = __ldg(from + v);
#else
    const uint4 loaded = from[v];
#endif
    memcpy(words + 4 * v, &loaded, 16);
  }
}

// About 64 bytes per thread are asked for before the first is used.
template <class Decoder>
constexpr int UNITS_PER_TURN = Decoder::vectors == 1 ? 4 : 1;

template <class Decoder, class Consumer>
__global__ void __launch_bounds__(THREADS, 1) decode_loop(const __grid_constant__ Decode args) {
  extern __shared__ uint32_t table[];
  Decoder::fill(args.levels, table, threadIdx.x, THREADS);
  __syncthreads();
  const Decoder decoder(args.levels, table, threadIdx.x % 32);
  Consumer consumer(args);
  uint32_t unit = blockIdx.x * args.block_stride + threadIdx.x;
  const int64_t start = clock64();
  for (int turn = 0; turn < args.turns; turn++) {
    uint32_t words[UNITS_PER_TURN<Decoder>][4 * Decoder::vectors];
#pragma unroll
    for (int u = 0; u < UNITS_PER_TURN<Decoder>; u++)
      load_unit<Decoder::vectors>(words[u], args.packed, (unit + u * args.step) & args.mask);
#pragma unroll
    for (int u = 0; u < UNITS_PER_TURN<Decoder>; u++)
#pragma unroll
      for (int i = 0; i < Decoder::eights; i++)
        consumer.take((unit + u * args.step) & args.mask, i, Decoder::eights, decoder.eight(words[u], i));
    unit += UNITS_PER_TURN<Decoder> * args.step;
  }
  __syncthreads();
  if (threadIdx.x == 0) static_cast<int64_t*>(args.cycles)[blockIdx.x] = clock64() - start;
  consumer.finish(args);
}

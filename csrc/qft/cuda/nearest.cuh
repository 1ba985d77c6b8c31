// Which level is nearest to a weight divided by its scale.
#pragma once

#include "qft/cuda/code.cuh"
#include "qft/cuda/launch.cuh"

namespace qft::QFT_ISA {

// What a rank among the levels stands for, and the midpoints that decide ranks.
struct Ranks {
  float midpoints[16], levels[16];
  uint32_t code_of_rank[16];
};

__device__ __forceinline__ void fill_ranks(Ranks& ranks, const Codebook& book) {
  for (unsigned rank = 0; rank < 16; rank++)  // no index by a register: it would put a copy on the stack
    if (threadIdx.x == rank) {
      ranks.midpoints[rank] = book.midpoints[rank];
      ranks.levels[rank] = book.ascending[rank];
      ranks.code_of_rank[rank] = book.code_of_rank[rank];
    }
  __syncthreads();
}

// Nearest integer, ties to even, in two additions; exact below 2^22, and what is larger stays so.
__device__ __forceinline__ float round_to_even(float a) { return (a + 0x1.8p23f) - 0x1.8p23f; }

template <class F>
__device__ __forceinline__ float lowest_integer(bool zero) {
  return zero ? 0 : -static_cast<float>(1 << (F::bits - 1));
}

// Integer level of a weight divided by its scale, the zero point included.
template <class F>
__device__ __forceinline__ float round_to_level(float scaled, float zero_point, bool zero) {
  const float low = lowest_integer<F>(zero), high = low + static_cast<float>((1 << F::bits) - 1);
  return fmaxf(fminf(round_to_even(scaled) + zero_point, high), low);
}

// The code of an integer level.
template <class F>
__device__ __forceinline__ uint32_t code_of(float level, bool zero) {
  // an integer added to 2^23 is the low bits of the sum
  return __float_as_uint(level + (0x1p23f - lowest_integer<F>(zero))) & 0xffu;
}

// Rank among the levels of a weight divided by its scale, ties going to the lower one: a binary search whose first two
// steps find their midpoints among the kernel's arguments.
template <class F>
__device__ __forceinline__ uint32_t rank_of(float scaled, const Codebook& book, const Ranks& ranks) {
  constexpr int half = F::levels / 2, quarter = F::levels / 4;
  const bool upper = book.midpoints[half - 1] < scaled;
  uint32_t rank = upper ? half : 0;
  if constexpr (quarter > 0) {
    if ((upper ? book.midpoints[half + quarter - 1] : book.midpoints[quarter - 1]) < scaled) rank += quarter;
    for (int step = quarter / 2; step > 0; step /= 2)
      if (ranks.midpoints[rank + step - 1] < scaled) rank += step;
  }
  return rank;
}

}  // namespace qft::QFT_ISA

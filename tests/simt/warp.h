// Barriers, shuffles, votes and reductions. Only __syncthreads and __syncwarp order memory.
#pragma once

#include <cstdint>
#include <type_traits>

#include "runtime.h"

inline void __syncthreads(SIMT_SITE) { simt::barrier(site); }

inline void __syncwarp(uint32_t mask = ~0u, SIMT_SITE) {
  simt::collective("__syncwarp", mask, false, nullptr, [](void**, uint32_t lanes) { simt::sync_lanes(lanes); }, site);
}

namespace simt {

// One lane's side of a shuffle: from(lane, operand, width) names the lane it reads; its own where that is out of range.
template <class T>
struct Shuffle {
  T value, result;
  int operand, width;
};

template <class T, int (*from)(int lane, int operand, int width)>
SIMT_NOSAN void shuffle_warp(void** lanes, uint32_t mask) {
  for (int i = 0; i < 32; i++) {
    if (!(mask >> i & 1)) continue;
    auto& mine = *static_cast<Shuffle<T>*>(lanes[i]);
    const int source = from(i, mine.operand, mine.width);
    if (!(mask >> source & 1)) fail("shuffle: lane %d reads lane %d, which is not in the mask %08x", i, source, mask);
    mine.result = static_cast<Shuffle<T>*>(lanes[source])->value;
  }
}

template <int (*from)(int, int, int), class T>
SIMT_NOSAN T shuffle(const char* op, uint32_t mask, T value, int operand, int width, Site site) {
  static_assert(std::is_trivially_copyable_v<T>);
  if (width < 1 || width > 32 || (width & (width - 1)))
    fail("%s at %s:%d: width %d is not a power of two up to 32", op, site.file, site.line, width);
  Shuffle<T> mine{value, value, operand, width};
  collective(op, mask, false, &mine, shuffle_warp<T, from>, site);
  return mine.result;
}

inline int from_index(int lane, int index, int width) { return (lane & -width) + (index & (width - 1)); }
inline int from_xor(int lane, int bits, int width) { return (lane ^ bits) / width > lane / width ? lane : lane ^ bits; }
inline int from_above(int lane, int delta, int width) { return lane % width + delta < width ? lane + delta : lane; }
inline int from_below(int lane, int delta, int width) { return lane % width >= delta ? lane - delta : lane; }

// One lane's side of a vote or reduction: everyone receives reduce(all values).
template <class T>
struct Vote {
  T value, result;
};

template <class T, T (*reduce)(T, T)>
SIMT_NOSAN void reduce_warp(void** lanes, uint32_t mask) {
  const int first = __builtin_ctz(mask);
  T result = static_cast<Vote<T>*>(lanes[first])->value;
  for (int i = first + 1; i < 32; i++)
    if (mask >> i & 1) result = reduce(result, static_cast<Vote<T>*>(lanes[i])->value);
  for (int i = 0; i < 32; i++)
    if (mask >> i & 1) static_cast<Vote<T>*>(lanes[i])->result = result;
}

template <class T, T (*reduce)(T, T)>
SIMT_NOSAN T vote(const char* op, uint32_t mask, T value, Site site) {
  Vote<T> mine{value, value};
  collective(op, mask, false, &mine, reduce_warp<T, reduce>, site);
  return mine.result;
}

template <class T>
SIMT_NOSAN T add(T a, T b) {
  return static_cast<T>(static_cast<unsigned>(a) + static_cast<unsigned>(b));  // wraps, as the hardware
}
template <class T>
SIMT_NOSAN T lower(T a, T b) {
  return b < a ? b : a;
}
template <class T>
SIMT_NOSAN T higher(T a, T b) {
  return a < b ? b : a;
}
SIMT_NOSAN inline unsigned bit_and(unsigned a, unsigned b) { return a & b; }
SIMT_NOSAN inline unsigned bit_or(unsigned a, unsigned b) { return a | b; }
SIMT_NOSAN inline unsigned bit_xor(unsigned a, unsigned b) { return a ^ b; }

}  // namespace simt

template <class T>
inline T __shfl_sync(uint32_t mask, T value, int source, int width = 32, SIMT_SITE) {
  return simt::shuffle<simt::from_index>("__shfl_sync", mask, value, source, width, site);
}
template <class T>
inline T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32, SIMT_SITE) {
  return simt::shuffle<simt::from_xor>("__shfl_xor_sync", mask, value, bits, width, site);
}
template <class T>
inline T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32, SIMT_SITE) {
  return simt::shuffle<simt::from_above>("__shfl_down_sync", mask, value, static_cast<int>(delta), width, site);
}
template <class T>
inline T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32, SIMT_SITE) {
  return simt::shuffle<simt::from_below>("__shfl_up_sync", mask, value, static_cast<int>(delta), width, site);
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate, SIMT_SITE) {
  const uint32_t mine = static_cast<uint32_t>(predicate != 0) << simt::lane();
  return simt::vote<unsigned, simt::bit_or>("__ballot_sync", mask, mine, site);
}
inline int __any_sync(uint32_t mask, int predicate, SIMT_SITE) {
  return static_cast<int>(simt::vote<unsigned, simt::bit_or>("__any_sync", mask, predicate != 0, site));
}
inline int __all_sync(uint32_t mask, int predicate, SIMT_SITE) {
  return static_cast<int>(simt::vote<unsigned, simt::bit_and>("__all_sync", mask, predicate != 0, site));
}

template <class T>
inline T __reduce_add_sync(uint32_t mask, T value, SIMT_SITE) {
  return simt::vote<T, simt::add<T>>("__reduce_add_sync", mask, value, site);
}
template <class T>
inline T __reduce_min_sync(uint32_t mask, T value, SIMT_SITE) {
  return simt::vote<T, simt::lower<T>>("__reduce_min_sync", mask, value, site);
}
template <class T>
inline T __reduce_max_sync(uint32_t mask, T value, SIMT_SITE) {
  return simt::vote<T, simt::higher<T>>("__reduce_max_sync", mask, value, site);
}
inline unsigned __reduce_and_sync(uint32_t mask, unsigned value, SIMT_SITE) {
  return simt::vote<unsigned, simt::bit_and>("__reduce_and_sync", mask, value, site);
}
inline unsigned __reduce_or_sync(uint32_t mask, unsigned value, SIMT_SITE) {
  return simt::vote<unsigned, simt::bit_or>("__reduce_or_sync", mask, value, site);
}
inline unsigned __reduce_xor_sync(uint32_t mask, unsigned value, SIMT_SITE) {
  return simt::vote<unsigned, simt::bit_xor>("__reduce_xor_sync", mask, value, site);
}

// What hopper.cpp (mbarrier, TMA) and wgmma.cpp share. Inside of the emulator; kernels see hopper_twin.h.
#pragma once

#include "engine.h"

namespace simt {

// The last engine carries out TMA loads, engine i < kLoader the wgmmas of warpgroup i.
constexpr int kLoader = kEngines - 1;

// 16-byte chunks change places within a row of `span` bytes, by the number of the 128-byte line they lie in.
inline uint32_t swizzle(uint32_t address, int span) {
  return span ? address ^ (address >> 7 & (span / 16 - 1)) << 4 : address;
}

// Bytes after which a swizzle repeats, to which tiles are therefore aligned.
inline uint32_t period(int span) { return span ? 8 * span : 128; }

// Whether the thread has fenced what it wrote at `time` towards the asynchronous proxy.
bool fenced(int thread, uint32_t time);

}  // namespace simt

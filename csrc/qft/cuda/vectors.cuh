// Runs of numbers between registers and memory: 16 bytes at a time where address and row pitch allow, one number at a
// time elsewhere and at a row's end.
#pragma once

#include "qft/cuda/numbers.cuh"

namespace qft::QFT_ISA {

template <class T>
constexpr int kPerVector = 16 / sizeof(T);  // numbers in 16 bytes

// Whether every row of a matrix starts at a multiple of 16 bytes; `pitch` in numbers.
template <class T>
bool rows_aligned(const T* p, int64_t pitch) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && pitch % kPerVector<T> == 0;
}

// p[0 .. min(left, count)) as fp32, zeros after them. `aligned`: p is a multiple of 16 bytes.
template <class T, int count>
__device__ __forceinline__ void load_run(const T* p, int64_t left, bool aligned, float (&to)[count]) {
  static_assert(count % kPerVector<T> == 0);
  if (aligned && left >= count) {
    alignas(16) T numbers[count];
    for (int i = 0; i < count; i += kPerVector<T>)
      *reinterpret_cast<uint4*>(numbers + i) = *reinterpret_cast<const uint4*>(p + i);
    for (int i = 0; i < count; i++) to[i] = to_float(numbers[i]);
  } else {
    const int kept = static_cast<int>(left < count ? left : count);
    for (int i = 0; i < count; i++) to[i] = i < kept ? to_float(p[i]) : 0.0f;
  }
}

// The reverse, each number rounded once.
template <class T, int count>
__device__ __forceinline__ void store_run(T* p, int64_t left, bool aligned, const float (&from)[count]) {
  static_assert(count % kPerVector<T> == 0);
  if (aligned && left >= count) {
    alignas(16) T numbers[count];
    for (int i = 0; i < count; i++) numbers[i] = from_float<T>(from[i]);
    for (int i = 0; i < count; i += kPerVector<T>)
      *reinterpret_cast<uint4*>(p + i) = *reinterpret_cast<const uint4*>(numbers + i);
  } else {
    const int kept = static_cast<int>(left < count ? left : count);
    for (int i = 0; i < count; i++)
      if (i < kept) p[i] = from_float<T>(from[i]);
  }
}

}  // namespace qft::QFT_ISA

// Arrays of any dtype read and written as fp32, one number or one vector at a time, and a thread's scratch.
#pragma once

#include <stdlib.h>

#include "qft/cpu/numbers.h"
#include "qft/format.h"

namespace qft::QFT_ISA {

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static inline float read(const void* p, int64_t i, Dtype dtype) {
  if (dtype == Dtype::f32) return static_cast<const float*>(p)[i];
  const uint16_t half = static_cast<const uint16_t*>(p)[i];
  return dtype == Dtype::bf16 ? from_bf16(half) : from_f16(half);
}
static inline void write(void* p, int64_t i, float value, Dtype dtype) {
  if (dtype == Dtype::f32)
    static_cast<float*>(p)[i] = value;
  else
    static_cast<uint16_t*>(p)[i] = dtype == Dtype::bf16 ? to_bf16(value) : to_f16(value);
}
static inline Vec load_as(const void* p, int64_t i, Dtype dtype) {
  if (dtype == Dtype::f32) return load(static_cast<const float*>(p) + i);
  const uint16_t* half = static_cast<const uint16_t*>(p) + i;
  return dtype == Dtype::bf16 ? load_bf16(half) : load_f16(half);
}
static inline void store_as(void* p, int64_t i, Vec value, Dtype dtype) {
  if (dtype == Dtype::f32) return store(static_cast<float*>(p) + i, value);
  uint16_t* half = static_cast<uint16_t*>(p) + i;
  dtype == Dtype::bf16 ? store_bf16(half, value) : store_f16(half, value);
}

// fp32 values as they come back from memory
static inline Vec as_stored(Vec value, Dtype dtype) {
  if (dtype == Dtype::f32) return value;
  uint16_t halves[16];
  store_as(halves, 0, value, dtype);
  return load_as(halves, 0, dtype);
}

// p[first .. first + count) -> fp32, zeros up to `padded`
static inline void read_run(const void* p, int64_t first, int64_t count, Dtype dtype, float* to, int64_t padded) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) store(to + i, load_as(p, first + i, dtype));
  for (; i < count; i++) to[i] = read(p, first + i, dtype);
  for (; i < padded; i++) to[i] = 0;
}
static inline void write_run(void* p, int64_t first, int64_t count, Dtype dtype, const float* from) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) store_as(p, first + i, load(from + i), dtype);
  for (; i < count; i++) write(p, first + i, from[i], dtype);
}

// Memory of one call: a few rows of scales, activations or sums, never a matrix. It starts on a cache line, or vectors
// would cross one.
struct Scratch {
  float* data;
  explicit Scratch(int64_t floats)
      : data(static_cast<float*>(aligned_alloc(64, (static_cast<size_t>(floats) * sizeof(float) + 63) / 64 * 64))) {}
  ~Scratch() { free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

}  // namespace qft::QFT_ISA

// quantize: three passes over a row that stays in the cache: the bounds of each group, its scale, its codes.
#pragma once

#include "qft/cpu/arrays.h"
#include "qft/decode.h"
#include "qft/encode.h"
#include "qft/launch.h"

namespace qft::QFT_ISA {

static inline float abs(float a) { return a < 0 ? -a : a; }

// fp32 value of a scale or zero point as it will be stored
static inline float as_stored(float value, Dtype dtype) {
  return dtype == Dtype::f32 ? value : dtype == Dtype::bf16 ? from_bf16(to_bf16(value)) : from_f16(to_f16(value));
}

// The smallest scale whose reciprocal is finite and normal; a group below it is a group of zeros.
constexpr float kSmallestScale = 1.17549435e-38f;

// What a thread keeps of the row at hand: weights padded with zeros, and per group the bounds, then what codes need.
struct QuantizeScratch {
  Scratch buffer, low, high, inverse, zero_point;
  explicit QuantizeScratch(const QuantizeArgs& a)
      : buffer(blocks(a.in) * kBlock), low(a.groups), high(a.groups), inverse(a.groups), zero_point(a.groups) {}
};

// Smallest and largest weight of each group, 0 included; false where a weight is not finite.
static inline bool find_bounds(const QuantizeArgs& a, const float* row, const QuantizeScratch& s) {
  bool finite = true;
  for (int64_t g = 0; g < a.groups; g++) {
    const int64_t first = g * a.group, last = g + 1 == a.groups ? a.in : first + a.group;
    Vec low = zero(), high = zero();
    for (int64_t j = first; j < last; j += 16) {  // past the row's end lie zeros, which neither bound minds
      const Vec v = load(row + j);
      finite &= !any_not_finite(v);
      low = min(low, v);
      high = max(high, v);
    }
    s.low.data[g] = lowest(low);
    s.high.data[g] = highest(high);
  }
  return finite;
}

template <class F>
static inline void set_scales(const QuantizeArgs& a, const Codebook& book, int64_t o, const QuantizeScratch& s) {
  constexpr float top = static_cast<float>((1 << F::bits) - 1);
  const Dtype stored = a.scale_kind == Scale::dq ? Dtype::f32 : static_cast<Dtype>(a.scale_kind);
  for (int64_t g = 0; g < a.groups; g++) {
    const float low = s.low.data[g], high = s.high.data[g];
    const float extreme = high > -low ? high : low;  // of largest magnitude; on a tie the negative one
    float scale = a.zero              ? (high - low) / top
                  : book.signed_scale ? extreme / book.anchor
                                      : abs(extreme) / abs(book.anchor);
    scale = as_stored(scale, stored);
    const bool empty = abs(scale) < kSmallestScale;
    s.inverse.data[g] = empty ? 0 : 1 / scale;
    write(a.scales, o * a.groups + g, empty ? 0 : scale, stored);
  }
  if (!a.zero) return;
  for (int64_t g = 0; g < a.groups; g++) {
    float lanes[16];
    store(lanes, min(round(broadcast(-s.low.data[g] * s.inverse.data[g])), broadcast(top)));
    s.zero_point.data[g] = lanes[0];
    write(a.zeros, o * a.groups + g, lanes[0], a.zero_kind);
  }
}

// codes of 16 weights, one byte each
template <class F>
static inline void encode16(const Codebook& book, const float* weights, Vec inverse, Vec zero_point, bool zero,
                            uint8_t* codes) {
  const Vec scaled = mul(load(weights), inverse);
  if constexpr (F::kind == Levels::integer) {
    const float low = zero ? 0 : -static_cast<float>(1 << (F::bits - 1)),
                high = low + static_cast<float>((1 << F::bits) - 1);
    const Vec whole = add(round(scaled), zero_point);
    store_bytes(codes, to_codes(sub(max(min(whole, broadcast(high)), broadcast(low)), broadcast(low))));
  } else {
    store_bytes_through(codes, rank<F::bits>(scaled, book.midpoints), book.code_of_rank);
  }
}

// The codes of 32 weights, packed at `to`; those past the row's end are 0.
template <class F>
static inline void encode32(const QuantizeArgs& a, const Codebook& book, const float* row, int64_t j, float inverse,
                            float zero_point, uint8_t* to) {
  uint8_t codes[kSub];
  for (int half = 0; half < kSub; half += 16)
    encode16<F>(book, row + j + half, broadcast(inverse), broadcast(zero_point), a.zero, codes + half);
  for (int64_t k = a.in - j; k < kSub; k++) codes[k] = 0;
  pack32<F::bits>(codes, to);
}

template <class F>
static inline void set_codes(const QuantizeArgs& a, const Codebook& book, const float* row, const QuantizeScratch& s,
                             uint8_t* codes) {
  constexpr int64_t bytes = packed_bytes(F::bits, kSub);
  int64_t at = 0;
  for (int64_t g = 0; g < a.groups; g++) {
    const int64_t last = g + 1 == a.groups ? a.in : (g + 1) * a.group;
    const float inverse = s.inverse.data[g], zero_point = a.zero ? s.zero_point.data[g] : 0;
    for (int64_t j = g * a.group; j < last; j += kSub, at += bytes) {
      if (at + bytes <= a.row_bytes) {
        encode32<F>(a, book, row, j, inverse, zero_point, codes + at);
      } else {  // a last one that the row's padding cuts short
        uint8_t packed[bytes];
        encode32<F>(a, book, row, j, inverse, zero_point, packed);
        __builtin_memcpy(codes + at, packed, static_cast<size_t>(a.row_bytes - at));
      }
    }
  }
  for (; at < a.row_bytes; at++) codes[at] = 0;
}

// -1, or the flat index of the row's first weight that is not finite
template <class F>
static int64_t quantize_row(const QuantizeArgs& a, const Codebook& book, int64_t o, const QuantizeScratch& s) {
  const float* row = s.buffer.data;
  if (a.dtype == Dtype::f32 && a.in % kSub == 0)
    row = static_cast<const float*>(a.weight) + o * a.in;
  else
    read_run(a.weight, o * a.in, a.in, a.dtype, s.buffer.data, blocks(a.in) * kBlock);
  if (!find_bounds(a, row, s))
    for (int64_t j = 0; j < a.in; j++)
      if ((bits_of(row[j]) & 0x7f800000u) == 0x7f800000u) return o * a.in + j;
  set_scales<F>(a, book, o, s);
  set_codes<F>(a, book, row, s, a.codes + o * a.row_bytes);
  return -1;
}

template <class F>
static void quantize(const QuantizeArgs& a) {
  const Codebook book = F::book(a.levels, a.count, a.zero);
  int64_t bad = INT64_MAX;
#pragma omp parallel num_threads(a.place.threads)
  {
    const QuantizeScratch scratch(a);
#pragma omp for schedule(static) reduction(min : bad)
    for (int64_t o = 0; o < a.out; o++) {
      const int64_t at = quantize_row<F>(a, book, o, scratch);
      if (at >= 0 && at < bad) bad = at;
    }
  }
  *a.bad = bad;
}

}  // namespace qft::QFT_ISA

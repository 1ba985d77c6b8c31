// quantize: three passes over a row that stays in the cache: the bounds of each group, its scale, its codes. Between
// the last two a scale may be searched for.
#pragma once

#include "qft/cpu/search.h"
#include "qft/encode.h"

namespace qft::QFT_ISA {

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
static inline float absmax_scale(const QuantizeArgs& a, const Codebook& book, float low, float high) {
  const float extreme = high > -low ? high : low;  // of largest magnitude; on a tie the negative one
  return a.zero              ? (high - low) / static_cast<float>((1 << F::bits) - 1)
         : book.signed_scale ? extreme / book.anchor
                             : abs(extreme) / abs(book.anchor);
}

template <class F>
static inline void set_scales(const QuantizeArgs& a, const Codebook& book, int64_t o, const QuantizeScratch& s) {
  constexpr float top = static_cast<float>((1 << F::bits) - 1);
  const Dtype stored = scale_dtype(a);
  for (int64_t g = 0; g < a.groups; g++) {
    const float scale = as_stored(absmax_scale<F>(a, book, s.low.data[g], s.high.data[g]), stored);
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

template <class F>
static inline void search_scales(const QuantizeArgs& a, const Codebook& book, int64_t o, const float* row,
                                 const QuantizeScratch& s, const ScaleSearch<F>& search) {
  for (int64_t g = 0; g < a.groups; g++) {
    const int64_t first = g * a.group, last = g + 1 == a.groups ? a.in : first + a.group;
    const float zero_point = a.zero ? s.zero_point.data[g] : 0;
    const float scale =
        search.best(row, first, last, absmax_scale<F>(a, book, s.low.data[g], s.high.data[g]), zero_point);
    if (scale == 0) continue;
    s.inverse.data[g] = 1 / scale;
    write(a.scales, o * a.groups + g, scale, scale_dtype(a));
  }
}

// codes of 16 weights, one byte each
template <class F>
static inline void encode16(const Codebook& book, const float* weights, Vec inverse, Vec zero_point, bool zero,
                            uint8_t* codes) {
  const Vec scaled = mul(load(weights), inverse);
  if constexpr (F::kind == Levels::integer) {
    const Vec low = broadcast(lowest_integer<F>(zero));
    store_bytes(codes, to_codes(sub(nearest_integer<F>(scaled, zero_point, low), low)));
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
static int64_t quantize_row(const QuantizeArgs& a, const Codebook& book, int64_t o, const QuantizeScratch& s,
                            const ScaleSearch<F>& search) {
  const float* row = s.buffer.data;
  if (a.dtype == Dtype::f32 && a.in % kSub == 0)
    row = static_cast<const float*>(a.weight) + o * a.in;
  else
    read_run(a.weight, o * a.in, a.in, a.dtype, s.buffer.data, blocks(a.in) * kBlock);
  if (!find_bounds(a, row, s))
    for (int64_t j = 0; j < a.in; j++)
      if ((bits_of(row[j]) & 0x7f800000u) == 0x7f800000u) return o * a.in + j;
  set_scales<F>(a, book, o, s);
  if (a.factors) search_scales<F>(a, book, o, row, s, search);
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
    const ScaleSearch<F> search(a, book);
#pragma omp for schedule(static) reduction(min : bad)
    for (int64_t o = 0; o < a.out; o++) {
      const int64_t at = quantize_row<F>(a, book, o, scratch, search);
      if (at >= 0 && at < bad) bad = at;
    }
  }
  *a.bad = bad;
}

}  // namespace qft::QFT_ISA

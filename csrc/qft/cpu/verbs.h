// The five verbs, written once over 16-lane vectors and compiled once per instruction set: QFT_ISA names the folder-mate
// of isa/ that supplies the vectors. A format F states bits, levels and whether they are integers; group size and scale
// kind are run-time data. Nothing here depends on the number of threads: one thread owns each output, in a fixed order.
//
// Everything lives in a namespace of its instruction set, and no template of the standard library is used: a function
// compiled with AVX-512 must never be the one the linker keeps for a machine without it.
#pragma once

#include "qft/decode.h"
#include "qft/encode.h"
#include "qft/launch.h"

#define QFT_STRING_(x) #x
#define QFT_STRING(x) QFT_STRING_(x)
#define QFT_ISA_HEADER_(set) QFT_STRING(qft/cpu/isa/set.h)
#define QFT_ISA_HEADER(set) QFT_ISA_HEADER_(set)
#include QFT_ISA_HEADER(QFT_ISA)

namespace qft::QFT_ISA {

// ---------------------------------------------------------------------------------------------------- numbers

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
static inline float abs(float a) { return a < 0 ? -a : a; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// fp32 value of a scale or zero point as it will be stored
static inline float as_stored(float value, Dtype dtype) {
  return dtype == Dtype::f32 ? value : dtype == Dtype::bf16 ? from_bf16(to_bf16(value)) : from_f16(to_f16(value));
}

static inline float scale_at(const Weight& w, int64_t i) {
  if (w.scale_kind == Scale::dq)  // two roundings, as bitsandbytes decodes it
    return w.dynamic_map[static_cast<const uint8_t*>(w.scales)[i]] * w.absmax[i / kDqBlock] + *w.offset;
  return read(w.scales, i, static_cast<Dtype>(w.scale_kind));
}

// ---------------------------------------------------------------------------------------------------- decoding

template <class F>
struct Decoder {
  Table<(F::bits < 8 ? F::bits : 4)> table;
  Vec lowest;  // of 8-bit integers, which convert instead of looking up
  const Weight& w;

  explicit Decoder(const Weight& weight)
      : table(F::codebook(weight.levels, weight.zeros != nullptr)), lowest(broadcast(weight.zeros ? 0.f : -128.f)), w(weight) {}

  // 128 codes at p -> their levels, in the order of code_at
  void levels(const uint8_t* p, Vec* v) const {
    if constexpr (F::bits == 8) {
      for (int i = 0; i < 8; i++) v[i] = add(to_float(load_bytes(p + 16 * i)), lowest);
    } else if constexpr (F::bits == 4) {
      for (int i = 0; i < 4; i++) {
        const Codes bytes = load_bytes(p + 16 * i);
        v[2 * i] = table[bytes];
        v[2 * i + 1] = table[shift_right(bytes, 4)];
      }
    } else if constexpr (F::bits == 3) {
      Codes octet[4];
      unpack3(p, octet);
      for (int i = 0; i < 4; i++) {
        v[2 * i] = table[octet[i]];
        v[2 * i + 1] = table[shift_right(octet[i], 4)];
      }
    } else if constexpr (F::bits == 2) {
      for (int i = 0; i < 2; i++) {
        const Codes bytes = load_bytes(p + 16 * i);
        for (int j = 0; j < 4; j++) v[4 * i + j] = table[shift_right(bytes, 2 * j)];
      }
    } else {
      const Codes bytes = load_bytes(p);
      for (int i = 0; i < 8; i++) v[i] = table[shift_right(bytes, i)];
    }
  }

  // The codes of block b of row o. The last block of a row may be cut short by the row's padding: it is copied out first,
  // so no load passes the end of the row.
  const uint8_t* block(int64_t o, int64_t b, uint8_t* copy) const {
    constexpr int64_t bytes = packed_bytes(F::bits, kBlock);
    const uint8_t* p = w.codes + o * w.row_bytes + b * bytes;
    const int64_t left = w.row_bytes - b * bytes;
    if (left >= bytes) return p;
    for (int64_t i = 0; i < bytes; i++) copy[i] = i < left ? p[i] : 0;
    return copy;
  }
};

// The scales (or zero points) of one row as fp32, one per 32 weights, so that kernels need not know the group size.
struct RowScales {
  // per_sub: [blocks * 4]
  static void read_scales(const Weight& w, int64_t o, float* per_sub) {
    for (int64_t g = 0; g < w.groups; g++) spread(w, g, scale_at(w, o * w.groups + g), per_sub);
  }
  static void read_zeros(const Weight& w, int64_t o, float* per_sub) {
    for (int64_t g = 0; g < w.groups; g++) spread(w, g, read(w.zeros, o * w.groups + g, w.zero_kind), per_sub);
  }

 private:
  static void spread(const Weight& w, int64_t g, float value, float* per_sub) {
    const int64_t subs = blocks(w.in) * kSubs;
    const int64_t first = g * w.group / kSub, last = g + 1 == w.groups ? subs : (g + 1) * w.group / kSub;
    for (int64_t i = first; i < last; i++) per_sub[i] = value;
  }
};

// The scales of the lanes of vector v of a block, from one scale per 32 weights.
template <int bits>
static inline Vec lane_scales(const float* per_sub, int v) {
  constexpr int lanes = lanes_per_sub(bits);
  return load_repeated<lanes>(per_sub + v / vectors_per_sub(bits) * (16 / lanes));
}

template <class F>
static inline void decode(const Decoder<F>& decoder, int64_t o, int64_t b, const float* zeros, Vec* v) {
  uint8_t copy[packed_bytes(F::bits, kBlock)];
  decoder.levels(decoder.block(o, b, copy), v);
  if (zeros)
    for (int i = 0; i < 8; i++) v[i] = sub(v[i], lane_scales<F::bits>(zeros + b * kSubs, i));
}

// Scratch of a few rows per thread, on the stack up to this many weights a row, else on the heap.
struct RowBuffer {
  float* data;
  explicit RowBuffer(int64_t floats) : data(static_cast<float*>(__builtin_malloc(static_cast<size_t>(floats) * sizeof(float)))) {}
  ~RowBuffer() { __builtin_free(data); }
  RowBuffer(const RowBuffer&) = delete;
  RowBuffer& operator=(const RowBuffer&) = delete;
};

// One row's scales and, for asymmetric formats, zero points.
struct RowCompanions {
  RowBuffer scales, zero_points;
  const Weight& w;
  explicit RowCompanions(const Weight& weight)
      : scales(blocks(weight.in) * kSubs), zero_points(weight.zeros ? blocks(weight.in) * kSubs : 1), w(weight) {}
  void read(int64_t o) {
    RowScales::read_scales(w, o, scales.data);
    if (w.zeros) RowScales::read_zeros(w, o, zero_points.data);
  }
  const float* zeros() const { return w.zeros ? zero_points.data : nullptr; }
};

// ---------------------------------------------------------------------------------------------------- quantize

// codes of 32 weights against one scale; `count` of them are real
template <class F>
static inline void encode32(const Codebook& book, const float* weights, float inverse, float zero_point, bool zero, uint8_t* codes) {
  for (int half = 0; half < 2; half++) {
    const Vec scaled = mul(load(weights + 16 * half), broadcast(inverse));
    if constexpr (F::kind == Levels::integer) {
      const float low = zero ? 0 : -static_cast<float>(1 << (F::bits - 1)), high = low + static_cast<float>((1 << F::bits) - 1);
      const Vec whole = add(round(scaled), broadcast(zero_point));
      const Vec code = sub(max(min(whole, broadcast(high)), broadcast(low)), broadcast(low));
      store_bytes(codes + 16 * half, to_codes(code));
    } else {
      uint8_t ranks[16];
      store_bytes(ranks, rank(scaled, book.midpoints));
      for (int i = 0; i < 16; i++) codes[16 * half + i] = book.code_of_rank[ranks[i]];
    }
  }
}

// The smallest scale whose reciprocal is finite and normal; a group below it is a group of zeros.
constexpr float kSmallestScale = 1.17549435e-38f;

template <class F>
static int64_t quantize_row(const QuantizeArgs& a, const Codebook& book, int64_t o, float* row) {
  const int64_t padded = blocks(a.in) * kBlock;
  int64_t i = 0;
  for (; i + 16 <= a.in; i += 16) store(row + i, load_as(a.weight, o * a.in + i, a.dtype));
  for (; i < a.in; i++) row[i] = read(a.weight, o * a.in + i, a.dtype);
  for (; i < padded; i++) row[i] = 0;

  uint8_t* codes = a.codes + o * a.row_bytes;
  int64_t written = 0;
  for (int64_t g = 0; g < a.groups; g++) {
    const int64_t first = g * a.group, last = g + 1 == a.groups ? a.in : first + a.group;
    Vec low = zero(), high = zero();
    bool bad = false;
    for (int64_t j = first; j < last; j += 16) {  // past the row's end lie zeros, which neither bound minds
      const Vec v = load(row + j);
      bad |= any_not_finite(v);
      low = min(low, v);
      high = max(high, v);
    }
    if (bad)
      for (int64_t j = first; j < last; j++)
        if ((bits_of(row[j]) & 0x7f800000u) == 0x7f800000u) return o * a.in + j;
    float lanes[32];
    store(lanes, low);
    store(lanes + 16, high);
    float lowest = 0, highest = 0;
    for (int l = 0; l < 16; l++) {
      if (lanes[l] < lowest) lowest = lanes[l];
      if (lanes[16 + l] > highest) highest = lanes[16 + l];
    }

    float scale, zero_point = 0;
    if (a.zero) {
      scale = (highest - lowest) / static_cast<float>((1 << F::bits) - 1);
    } else {
      const float extreme = highest > -lowest ? highest : lowest;  // of largest magnitude; on a tie the negative one
      scale = (book.signed_scale ? extreme : abs(extreme)) / (book.signed_scale ? book.anchor : abs(book.anchor));
    }
    if (a.scale_kind != Scale::dq) scale = as_stored(scale, static_cast<Dtype>(a.scale_kind));
    const bool empty = abs(scale) < kSmallestScale;
    if (empty) scale = 0;
    const float inverse = empty ? 0 : 1 / scale;
    if (a.zero) {
      float lanes16[16];
      store(lanes16, round(broadcast(-lowest * inverse)));
      const float top = static_cast<float>((1 << F::bits) - 1);
      zero_point = lanes16[0] > top ? top : lanes16[0];
      write(a.zeros, o * a.groups + g, zero_point, a.zero_kind);
    }
    write(a.scales, o * a.groups + g, scale, a.scale_kind == Scale::dq ? Dtype::f32 : static_cast<Dtype>(a.scale_kind));

    const int64_t end = g + 1 == a.groups ? (a.in + kSub - 1) / kSub * kSub : last;
    for (int64_t j = first; j < end; j += kSub) {
      uint8_t bytes[kSub], packed[kSub];
      encode32<F>(book, row + j, inverse, zero_point, a.zero, bytes);
      for (int64_t k = a.in - j; k < kSub; k++) bytes[k] = 0;  // padding codes are 0
      pack32<F::bits>(bytes, packed);
      const int64_t at = packed_bytes(F::bits, j), size = least(packed_bytes(F::bits, kSub), a.row_bytes - at);
      __builtin_memcpy(codes + at, packed, static_cast<size_t>(size));
      written = at + size;
    }
  }
  for (; written < a.row_bytes; written++) codes[written] = 0;
  return -1;
}

template <class F>
static int64_t quantize(const QuantizeArgs& a) {
  const Codebook book = F::book(a.levels, a.count, a.zero);
  int64_t bad = INT64_MAX;
#pragma omp parallel num_threads(a.threads)
  {
    RowBuffer row(blocks(a.in) * kBlock + 16);
#pragma omp for schedule(static) reduction(min : bad)
    for (int64_t o = 0; o < a.out; o++) {
      const int64_t at = quantize_row<F>(a, book, o, row.data);
      if (at >= 0 && at < bad) bad = at;
    }
  }
  return bad == INT64_MAX ? -1 : bad;
}

// ---------------------------------------------------------------------------------------------------- dequantize

template <class F>
static void dequantize(const DequantizeArgs& a) {
  const Decoder<F> decoder(a.weight);
  const int64_t first = a.col0 / kBlock, last = blocks(a.col1);
#pragma omp parallel num_threads(a.threads)
  {
    RowCompanions row(a.weight);
#pragma omp for schedule(static)
    for (int64_t o = a.row0; o < a.row1; o++) {
      row.read(o);
      for (int64_t b = first; b < last; b++) {
        Vec v[8];
        decode<F>(decoder, o, b, row.zeros(), v);
        for (int i = 0; i < 8; i++) v[i] = mul(v[i], lane_scales<F::bits>(row.scales.data + b * kSubs, i));
        float dense[kBlock];
        store_in_order<F::bits>(dense, v);
        const int64_t at = (o - a.row0) * a.stride + b * kBlock - a.col0;
        const int64_t count = least(kBlock, a.col1 - b * kBlock);
        int64_t j = 0;
        for (; j + 16 <= count; j += 16) store_as(a.out, at + j, load(dense + j), a.dtype);
        for (; j < count; j++) write(a.out, at + j, dense[j], a.dtype);
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------- matmul

// x[rows][in] -> fp32 [rows][blocks * 128] in the order of code_at, zeros past the end
template <class F>
static void permute_rows(const MatmulArgs& a) {
  const int64_t padded = blocks(a.weight.in) * kBlock;
#pragma omp parallel for num_threads(a.threads) schedule(static) if (a.rows > 1)
  for (int64_t r = 0; r < a.rows; r++)
    for (int64_t b = 0; b < blocks(a.weight.in); b++) {
      float dense[kBlock];
      const int64_t at = r * a.weight.in + b * kBlock, count = least(kBlock, a.weight.in - b * kBlock);
      int64_t j = 0;
      for (; j + 16 <= count; j += 16) store(dense + j, load_as(a.x, at + j, a.dtype));
      for (; j < kBlock; j++) dense[j] = j < count ? read(a.x, at + j, a.dtype) : 0;
      Vec v[8];
      load_permuted<F::bits>(dense, v);
      for (int i = 0; i < 8; i++) store(a.workspace + r * padded + b * kBlock + 16 * i, v[i]);
    }
}

// One block's products with one row of x, scaled: groups of 128 and more take one scale per block, smaller ones one per
// run of vectors.
template <class F, bool one_scale>
static inline Vec multiply(const Vec* v, const float* x, const float* scales, Vec sum) {
  constexpr int run = one_scale ? 8 : vectors_per_sub(F::bits);
  for (int first = 0; first < 8; first += run) {
    Vec even = mul(v[first], load(x + 16 * first)), odd = mul(v[first + 1], load(x + 16 * first + 16));
    for (int i = first + 2; i < first + run; i += 2) {
      even = fma(v[i], load(x + 16 * i), even);
      odd = fma(v[i + 1], load(x + 16 * i + 16), odd);
    }
    sum = fma(add(even, odd), one_scale ? broadcast(scales[0]) : lane_scales<F::bits>(scales, first), sum);
  }
  return sum;
}

template <class F, bool one_scale>
static void matmul_rows(const MatmulArgs& a) {
  const Weight& w = a.weight;
  const Decoder<F> decoder(w);
  const int64_t count = blocks(w.in), padded = count * kBlock;
#pragma omp parallel num_threads(a.threads)
  {
    RowCompanions row(w);
    RowBuffer sums(a.rows * 16);
#pragma omp for schedule(static)
    for (int64_t o = 0; o < w.out; o++) {
      row.read(o);
      for (int64_t r = 0; r < a.rows; r++) store(sums.data + 16 * r, zero());
      for (int64_t b = 0; b < count; b++) {
        Vec v[8];
        decode<F>(decoder, o, b, row.zeros(), v);
        for (int64_t r = 0; r < a.rows; r++) {
          const float* x = a.workspace + r * padded + b * kBlock;
          const Vec sum = load(sums.data + 16 * r);
          store(sums.data + 16 * r, multiply<F, one_scale>(v, x, row.scales.data + b * kSubs, sum));
        }
      }
      for (int64_t r = 0; r < a.rows; r++) write(a.y, r * w.out + o, sum(load(sums.data + 16 * r)), a.dtype);
    }
  }
}

template <class F>
static void matmul(const MatmulArgs& a) {
  permute_rows<F>(a);
  a.weight.group >= kBlock ? matmul_rows<F, true>(a) : matmul_rows<F, false>(a);
}

// ---------------------------------------------------------------------------------------------------- matmul_t

// A thread owns a stripe of columns and adds the rows of W in order; the sums stay in the order of code_at until stored.
template <class F>
static void matmul_t(const MatmulTArgs& a) {
  constexpr int64_t kStripe = 4;  // blocks: 512 columns, 2 KiB of sums a row
  const Weight& w = a.weight;
  const Decoder<F> decoder(w);
  const int64_t count = blocks(w.in), stripes = (count + kStripe - 1) / kStripe;
#pragma omp parallel num_threads(a.threads)
  {
    RowCompanions row(w);
    RowBuffer sums(a.rows * kStripe * kBlock);
#pragma omp for schedule(static)
    for (int64_t stripe = 0; stripe < stripes; stripe++) {
      const int64_t first = stripe * kStripe, last = least(first + kStripe, count);
      for (int64_t i = 0; i < a.rows * kStripe * 8; i++) store(sums.data + 16 * i, zero());
      for (int64_t o = 0; o < w.out; o++) {
        row.read(o);
        for (int64_t b = first; b < last; b++) {
          Vec v[8];
          decode<F>(decoder, o, b, row.zeros(), v);
          for (int i = 0; i < 8; i++) v[i] = mul(v[i], lane_scales<F::bits>(row.scales.data + b * kSubs, i));
          for (int64_t r = 0; r < a.rows; r++) {
            const Vec dy = broadcast(read(a.dy, r * w.out + o, a.dtype));
            float* sum = sums.data + (r * kStripe + b - first) * kBlock;
            for (int i = 0; i < 8; i++) store(sum + 16 * i, fma(v[i], dy, load(sum + 16 * i)));
          }
        }
      }
      for (int64_t r = 0; r < a.rows; r++)
        for (int64_t b = first; b < last; b++) {
          Vec v[8];
          for (int i = 0; i < 8; i++) v[i] = load(sums.data + (r * kStripe + b - first) * kBlock + 16 * i);
          float dense[kBlock];
          store_in_order<F::bits>(dense, v);
          const int64_t columns = least(kBlock, w.in - b * kBlock);
          for (int64_t j = 0; j < columns; j++) write(a.dx, r * w.in + b * kBlock + j, dense[j], a.dtype);
        }
    }
  }
}

// ---------------------------------------------------------------------------------------------------- scale_grad

template <class F>
static void scale_grad(const ScaleGradArgs& a) {
  const Weight& w = a.weight;
  const Decoder<F> decoder(w);
#pragma omp parallel num_threads(a.threads)
  {
    RowCompanions row(w);
#pragma omp for schedule(static)
    for (int64_t o = a.row0; o < a.row1; o++) {
      row.read(o);
      const int64_t dw = (o - a.row0) * w.in;
      float* ds = a.ds + (o - a.row0) * w.groups;
      for (int64_t g = 0; g < w.groups; g++) ds[g] = 0;
      for (int64_t b = 0; b < blocks(w.in); b++) {
        Vec v[8];
        decode<F>(decoder, o, b, row.zeros(), v);
        float level[kBlock];
        store_in_order<F::bits>(level, v);
        for (int64_t j = b * kBlock; j < least((b + 1) * kBlock, w.in); j += kSub) {
          const int64_t end = least(j + kSub, w.in);
          float part = 0;
          if (end == j + kSub)
            part = sum(fma(load(level + j % kBlock), load_as(a.dw, dw + j, a.dtype),
                           mul(load(level + j % kBlock + 16), load_as(a.dw, dw + j + 16, a.dtype))));
          else
            for (int64_t k = j; k < end; k++) part += level[k % kBlock] * read(a.dw, dw + k, a.dtype);
          ds[j / w.group] += part;
        }
      }
    }
  }
}

template <class F>
constexpr Kernels kernels_of(const char* isa) {
  return {F::name, isa, quantize<F>, dequantize<F>, matmul<F>, matmul_t<F>, scale_grad<F>};
}

}  // namespace qft::QFT_ISA

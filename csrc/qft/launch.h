// The arguments of the five verbs, field by field, and the table of one format's kernels on one instruction set.
#pragma once

#include "qft/format.h"

namespace qft {

// codes and scales of a dense matrix; under dq the scales are written in fp32 and quantized again by the caller
struct QuantizeArgs {
  const void* weight;  // [out][in] in dtype
  int64_t out, in, row_bytes, group, groups;
  Dtype dtype;
  bool zero;         // asymmetric: codes count from the zero point
  Scale scale_kind;  // codes are chosen against the scale as stored
  Dtype zero_kind;
  const float* levels;  // [1 << bits]; read by the kernels that were not compiled for a codebook
  int count;            // levels in use, <= 1 << bits; likewise
  uint8_t* codes;       // [out][row_bytes]
  void* scales;         // [out][groups]
  void* zeros;          // [out][groups] or null
  int threads;
};

// a rectangle of W, dense
struct DequantizeArgs {
  Weight weight;
  int64_t row0, row1, col0, col1;  // col0 a multiple of 128
  void* out;                       // [row1 - row0][stride] in dtype
  int64_t stride;                  // elements between rows of out
  Dtype dtype;
  int threads;
};

// y = x Wt
struct MatmulArgs {
  Weight weight;
  const void* x;  // [rows][in] in dtype
  void* y;        // [rows][out] in dtype
  int64_t rows;
  Dtype dtype;
  float* workspace;  // rows * blocks(in) * 128
  int threads;
};

// dx = dy W
struct MatmulTArgs {
  Weight weight;
  const void* dy;  // [rows][out] in dtype
  void* dx;        // [rows][in] in dtype
  int64_t rows;
  Dtype dtype;
  int threads;
};

// ds[o][g] = sum over the group of dW[o][j] * (level[o][j] - zero[o][g]), for rows row0..row1 of W
struct ScaleGradArgs {
  Weight weight;
  int64_t row0, row1;
  const void* dw;  // [row1 - row0][in] in dtype
  Dtype dtype;
  float* ds;  // [row1 - row0][groups]
  int threads;
};

struct Kernels {
  const char* code;                          // "nf4", "int3", "levels2" (any codebook of that width)
  const char* isa;                           // "scalar", "avx2", "avx512"
  int64_t (*quantize)(const QuantizeArgs&);  // flat index of the first weight that is not finite, or -1
  void (*dequantize)(const DequantizeArgs&);
  void (*matmul)(const MatmulArgs&);
  void (*matmul_t)(const MatmulTArgs&);
  void (*scale_grad)(const ScaleGradArgs&);
};

constexpr int64_t blocks(int64_t in) { return (in + kBlock - 1) / kBlock; }

}  // namespace qft

// The arguments of the verbs, field by field, and the table of one format's kernels on one instruction set.
#pragma once

#include "qft/format.h"

// The text of what a macro stands for: QFT_STRING(QFT_ISA) is the name of the instruction set compiled for.
#define QFT_STRING_(x) #x
#define QFT_STRING(x) QFT_STRING_(x)

namespace qft {

// Where a verb runs: on CPU threads, or on a CUDA device in a stream of the caller's.
struct Place {
  int threads;   // CPU
  int device;    // CUDA ordinal
  void* stream;  // cudaStream_t
};

// codes and scales of a dense matrix; under dq the scales are written in fp32 and quantized again by the caller
struct QuantizeArgs {
  const void* weight;  // [out][in] in dtype
  int64_t out, in, row_bytes, group, groups;
  Dtype dtype;
  bool zero;         // asymmetric: codes count from the zero point
  Scale scale_kind;  // codes are chosen against the scale as stored
  Dtype zero_kind;
  const float* levels;   // [1 << bits], host memory; read by the kernels that were not compiled for a codebook
  int count;             // levels in use, <= 1 << bits; likewise
  const float* factors;  // [factor_count] of a scale search: on the absmax scale, 1 first; null: absmax alone
  int factor_count;
  const float* importance;  // [in] what a column's squared error counts in a search, or null: all alike
  uint8_t* codes;           // [out][row_bytes]
  void* scales;             // [out][groups]
  void* zeros;              // [out][groups] or null
  int64_t* bad;             // [1] flat index of the first weight that is not finite, or INT64_MAX
  Place place;
};

// a rectangle of W, dense
struct DequantizeArgs {
  Weight weight;
  int64_t row0, row1, col0, col1;  // col0 a multiple of 128
  void* out;                       // [row1 - row0][stride] in dtype
  int64_t stride;                  // elements between rows of out
  Dtype dtype;
  Place place;
};

// y = x Wt
struct MatmulArgs {
  Weight weight;
  const void* x;  // [rows][in] in dtype
  void* y;        // [rows][out] in dtype
  int64_t rows;
  Dtype dtype;
  float* workspace;     // [matmul_workspace(...)]
  int pair_table_rows;  // CUDA: up to so many rows, 16 at most, 16 levels are looked up two at a time
  Place place;
};

// dx = dy W
struct MatmulTArgs {
  Weight weight;
  const void* dy;  // [rows][out] in dtype
  void* dx;        // [rows][in] in dtype
  int64_t rows;
  Dtype dtype;
  Place place;
};

// ds[o][g] = sum over the group of dW[o][j] * (level[o][j] - zero[o][g]), for rows row0..row1 of W
struct ScaleGradArgs {
  Weight weight;
  int64_t row0, row1;
  const void* dw;  // [row1 - row0][in] in dtype
  Dtype dtype;
  float* ds;  // [row1 - row0][groups]
  Place place;
};

// total[o] = sum over rows of a[row][o] * b[row][o], in fp32
struct DotColumnsArgs {
  const void* a;  // [rows][columns] in dtype
  const void* b;  // [rows][columns] in dtype
  int64_t rows, columns;
  Dtype dtype;
  float* total;      // [columns]
  float* workspace;  // [dot_columns_workspace(...)]
  Place place;
};

// ds[o] of per-channel scales that are 0: sum over rows of dy[row][o] * (x[row] . (level - zero)); others stay as they
// are
struct ZeroScaleGradArgs {
  Weight weight;
  const void* dy;  // [rows][out] in dtype
  const void* x;   // [rows][in] in dtype
  int64_t rows;
  Dtype dtype;
  float* ds;  // [out]
  Place place;
};

// A verb on a CUDA device is only launched; what fails there throws std::runtime_error.
struct Kernels {
  const char* code;  // "nf4", "int3", "levels2" (any codebook of that width)
  const char* isa;   // "scalar", "avx2", "avx512", "avx512_bf16", "cuda"
  void (*quantize)(const QuantizeArgs&);
  void (*dequantize)(const DequantizeArgs&);
  void (*matmul)(const MatmulArgs&);
  void (*matmul_t)(const MatmulTArgs&);
  void (*scale_grad)(const ScaleGradArgs&);
  void (*dot_columns)(const DotColumnsArgs&);
  void (*zero_scale_grad)(const ZeroScaleGradArgs&);
  // floats of scratch that a call needs
  int64_t (*matmul_workspace)(int64_t out, int64_t in, int64_t rows, int device);
  int64_t (*dot_columns_workspace)(int64_t rows, int64_t columns, int device);
};

constexpr int64_t blocks(int64_t in) { return (in + kBlock - 1) / kBlock; }

}  // namespace qft

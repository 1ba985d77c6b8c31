// The verbs on CUDA, compiled once per kind and width of code. matmul_t and large products are no kernels of their own:
// panels of dense weights, dequantized here, go through the dense product of cuBLAS.
#pragma once

#include "qft/cuda/code.cuh"
#include "qft/cuda/dequantize.cuh"
#include "qft/cuda/dot_columns.cuh"
#include "qft/cuda/gemm_small.cuh"
#include "qft/cuda/quantize.cuh"
#include "qft/cuda/scale_grad.cuh"
#include "qft/cuda/zero_scale_grad.cuh"
#include "qft/launch.h"

namespace qft::QFT_ISA {

template <class F>
constexpr Kernels kernels_of(const char* isa) {
  return {F::name,
          isa,
          quantize<F>,
          dequantize<F>,
          matmul<F>,
          nullptr,
          scale_grad<F>,
          dot_columns,
          zero_scale_grad<F>,
          matmul_workspace,
          dot_columns_workspace};
}

}  // namespace qft::QFT_ISA

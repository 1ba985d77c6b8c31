// The five verbs, written once over 16-lane vectors and compiled once per instruction set: QFT_ISA names the
// folder-mate of isa/ that supplies the vectors. A format F states bits, levels and whether they are integers; group
// size and scale kind are run-time data. Nothing here depends on the number of threads: each output is summed by one
// thread, in a fixed order, whoever takes it; nor does a row of y or dx depend on the rows beside it.
//
// Everything lives in a namespace of its instruction set, and no template of the standard library is used: a function
// compiled with AVX-512 must never be the one the linker keeps for a machine without it.
#pragma once

#include "qft/launch.h"

// clang-format off: it would put spaces into the path
#define QFT_ISA_HEADER_(set) QFT_STRING(qft/cpu/isa/set.h)
#define QFT_ISA_HEADER(set) QFT_ISA_HEADER_(set)
// clang-format on
#include QFT_ISA_HEADER(QFT_ISA)

#include "qft/cpu/dequantize.h"
#include "qft/cpu/dot_columns.h"
#include "qft/cpu/matmul.h"
#include "qft/cpu/matmul_t.h"
#ifdef __AVX512BF16__
#include "qft/cpu/pair_verbs.h"
#endif
#include "qft/cpu/quantize.h"
#include "qft/cpu/scale_grad.h"
#include "qft/cpu/zero_scale_grad.h"

namespace qft::QFT_ISA {

template <class F>
constexpr Kernels kernels_of(const char* isa) {
  return {F::name,
          isa,
          quantize<F>,
          dequantize<F>,
#ifdef __AVX512BF16__
          matmul_with_pairs<F>,
          matmul_t_with_pairs<F>,
#else
          matmul<F>,     matmul_t<F>,
#endif
          scale_grad<F>,
          dot_columns,
          zero_scale_grad<F>,
          matmul_workspace,
          dot_columns_workspace};
}

}  // namespace qft::QFT_ISA

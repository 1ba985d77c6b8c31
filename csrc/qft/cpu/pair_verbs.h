// Products where there are dot products of bf16: of activations in bf16, by those; of others, as without them. Few rows
// and many take different ways, so that a row's last bits depend on how many there are.
#pragma once

#include "qft/cpu/matmul.h"
#include "qft/cpu/matmul_t.h"
#include "qft/cpu/pair_product.h"
#include "qft/cpu/pair_rows.h"

namespace qft::QFT_ISA {

// Up to so many rows, lanes run along W's rows. Measured on one core of a Zen 5, 4096 x 4096 and 4096 x 14336, nf4 g64.
constexpr int64_t kFewRows = 16;
constexpr int64_t kFewRowsT = 7;

template <class F>
static void matmul_with_pairs(const MatmulArgs& a) {
  if (a.dtype != Dtype::bf16) return matmul<F>(a);
  a.rows > kFewRows ? run_on<F, ManyRows>(a) : run_on<F, FewRows>(a);
}

template <class F>
static void matmul_t_with_pairs(const MatmulTArgs& a) {
  if (a.dtype != Dtype::bf16 || a.rows <= kFewRowsT) return matmul_t<F>(a);
  run_on<F, ManyRowsT>(a);
}

}  // namespace qft::QFT_ISA

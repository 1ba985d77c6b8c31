// Launches gemm.cuh and its mutants for test_simt_gemm.py, which writes gemm_variants.h: namespaces variant_0,
// variant_1, ... each with a copy of gemm.cuh, and GEMM_VARIANTS(X) = X(0, b_by_k) X(1, b_by_k) ...
#include "gemm_variants.h"

SIMT_EXPORT const char* run_gemm(int variant, int m, int n, int k, const __nv_bfloat16* a, const __nv_bfloat16* b,
                                 float* c) {
  using Kernel = void (*)(const __nv_bfloat16*, const __nv_bfloat16*, float*, int, int, int);
#define KERNEL(i, b_by_k) variant_##i::gemm<3, b_by_k>,
  constexpr Kernel kernels[] = {GEMM_VARIANTS(KERNEL)};
#undef KERNEL
  simt::clear_buffers();
  simt::add_buffer(a, size_t(m) * k * 2, "a");
  simt::add_buffer(b, size_t(n) * k * 2, "b");
  simt::add_buffer(c, size_t(m) * n * 4, "c", simt::OUT);
  const dim3 grid((n + 63) / 64, (m + 63) / 64);
  if (!simt::launch(kernels[variant], grid, 128, 3 * 2 * 64 * 32 * 2, a, b, c, m, n, k)) return simt::error();
  return simt::unwritten(c) ? "c is not fully written" : nullptr;
}

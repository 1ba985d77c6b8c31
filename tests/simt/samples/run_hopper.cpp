// Launches hopper.cuh and its mutants for test_simt_hopper.py, which writes hopper_variants.h: namespaces variant_0,
// variant_1, ... each with a copy of hopper.cuh, and HOPPER_VARIANTS(X) = X(0, backward) X(1, backward) ...
#include "hopper_variants.h"

SIMT_EXPORT const char* run_hopper(int variant, int backward, int m, int outs, int ins, const void* x,
                                   const uint8_t* codes, const uint16_t* levels, float* y) {
  using Kernel = void (*)(CUtensorMap, const uint8_t*, const uint16_t*, float*, int, int, int);
#define KERNEL(i, backward) variant_##i::dequantized_gemm<backward>,
  constexpr Kernel kernels[] = {HOPPER_VARIANTS(KERNEL)};
#undef KERNEL
  const int depth = backward ? outs : ins, columns = backward ? ins : outs;
  simt::clear_buffers();
  simt::add_buffer(x, size_t(m) * depth * 2, "x");
  simt::add_buffer(codes, size_t(outs) * ins / 2, "codes");
  simt::add_buffer(levels, 32, "levels");
  simt::add_buffer(y, size_t(m) * columns * 4, "y", simt::OUT);
  const CUtensorMap x_map = simt::tensor_map_2d(x, depth, m, int64_t{depth} * 2, 64, 64, 2, 128);
  const dim3 grid((columns + 63) / 64, (m + 63) / 64);
  if (!simt::launch(kernels[variant], grid, 256, variant_0::kSharedBytes, x_map, codes, levels, y, m, outs, ins))
    return simt::error();
  return simt::unwritten(y) ? "y is not fully written" : nullptr;
}

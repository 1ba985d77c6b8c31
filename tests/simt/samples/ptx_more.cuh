// ldmatrix, which the samples use and qft's kernels do not: the instruction for nvcc, its twin for the emulator.
#pragma once

#include "qft/cuda/ptx.cuh"

namespace qft::ptx {

// Four 8x8 matrices of 16-bit elements from shared memory to a warp. Lane 8j + i gives the address of row i of matrix j
// (16 bytes, aligned to 16). Lane 4g + q receives, in result[j], elements (g, 2q) and (g, 2q+1) of matrix j, the lower
// column in the low half; with `transposed`, elements (2q, g) and (2q+1, g).
#ifdef __CUDACC__

template <bool transposed>
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&result)[4], uint32_t row_address) {
  if constexpr (transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
                 : "r"(row_address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
                 : "r"(row_address)
                 : "memory");
}

#else

struct LdmatrixLane {
  uint32_t* result;
  const char* row;
};

template <bool transposed>
SIMT_NOSAN inline void ldmatrix_x4_warp(void** lanes, uint32_t) {
  for (int j = 0; j < 4; j++) {
    uint16_t matrix[8][8];
    for (int i = 0; i < 8; i++) std::memcpy(matrix[i], static_cast<LdmatrixLane*>(lanes[8 * j + i])->row, 16);
    for (int t = 0; t < 32; t++) {
      const int g = t / 4, q = t % 4;
      const uint32_t low = transposed ? matrix[2 * q][g] : matrix[g][2 * q];
      const uint32_t high = transposed ? matrix[2 * q + 1][g] : matrix[g][2 * q + 1];
      static_cast<LdmatrixLane*>(lanes[t])->result[j] = high << 16 | low;
    }
  }
}

template <bool transposed>
__forceinline__ void ldmatrix_x4(uint32_t (&result)[4], uint32_t row_address, SIMT_SITE) {
  LdmatrixLane lane{result, simt::smem_ptr(row_address, 16)};
  simt::access(lane.row, 16, simt::READ);
  simt::collective(transposed ? "ldmatrix.x4.trans" : "ldmatrix.x4", ~0u, true, &lane, ldmatrix_x4_warp<transposed>,
                   site);
}

#endif

}  // namespace qft::ptx

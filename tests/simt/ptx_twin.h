// Host twins of csrc/qft/cuda/ptx.cuh: what each instruction does, in plain C++ on the emulator of simt.h. Contracts
// and fragment layouts stand there. A twin that can fail is forced inline, so that a report names the kernel's line.
#pragma once

#include <cstdint>
#include <type_traits>

#include "simt.h"

namespace qft::ptx {

// Register arithmetic has nothing to check, and inlined into kernels its loops take most of g++'s time.
#define SIMT_REGISTERS SIMT_NOSAN inline __attribute__((noinline))

SIMT_REGISTERS uint32_t prmt(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; i++) {
    const uint32_t nibble = selector >> 4 * i & 15;
    uint32_t byte = bytes >> 8 * (nibble & 7) & 0xff;
    if (nibble & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= byte << 8 * i;
  }
  return result;
}

template <int table>
SIMT_REGISTERS uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  static_assert(table >= 0 && table < 256);
  uint32_t result = 0;
  for (int row = 0; row < 8; row++)  // row 4a + 2b + c of the truth table
    if (table >> row & 1) result |= (row & 4 ? a : ~a) & (row & 2 ? b : ~b) & (row & 1 ? c : ~c);
  return result;
}

__forceinline__ uint32_t smem_u32(const void* shared) { return simt::smem_u32(shared); }

__forceinline__ void cp_async16(uint32_t destination, const void* source, uint32_t source_bytes = 16) {
  if (source_bytes > 16) simt::fail("cp.async: source size %u is more than the 16 bytes it copies", source_bytes);
  simt::cp_async(destination, source, 16, source_bytes);
}

__forceinline__ void cp_commit() { simt::cp_commit(); }

template <int pending>
__forceinline__ void cp_wait() {
  simt::cp_wait(pending);
}

// One lane's operands of an mma; the warp's last lane reads them through the other lanes' stacks.
struct MmaLane {
  float* c;
  const uint32_t *a, *b;
};

// Products of two 16-bit floats are exact in double, so the one rounding is the last. The hardware truncates inside.
template <float (*to_float)(uint16_t)>
SIMT_NOSAN inline void mma_m16n8k16_warp(void** lanes, uint32_t) {
  double a[16][16], b[8][16];  // b by column
  for (int t = 0; t < 32; t++) {
    const MmaLane& lane = *static_cast<MmaLane*>(lanes[t]);
    const int g = t / 4, q = t % 4;
    for (int half = 0; half < 2; half++) {
      for (int i = 0; i < 4; i++)
        a[g + i % 2 * 8][2 * q + i / 2 * 8 + half] = to_float(uint16_t(lane.a[i] >> 16 * half));
      for (int i = 0; i < 2; i++) b[g][2 * q + i * 8 + half] = to_float(uint16_t(lane.b[i] >> 16 * half));
    }
  }
  for (int t = 0; t < 32; t++)
    for (int i = 0; i < 4; i++) {
      float& c = static_cast<MmaLane*>(lanes[t])->c[i];
      const double *row = a[t / 4 + i / 2 * 8], *column = b[t % 4 * 2 + i % 2];
      double sum = c;
      for (int k = 0; k < 16; k++) sum += row[k] * column[k];
      c = float(sum);
    }
}

template <typename T>
__forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SIMT_SITE) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  MmaLane lane{c, a, b};
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    simt::collective("mma.sync.m16n8k16.bf16", ~0u, true, &lane, mma_m16n8k16_warp<simt::from_bf16>, site);
  else
    simt::collective("mma.sync.m16n8k16.f16", ~0u, true, &lane, mma_m16n8k16_warp<simt::from_f16>, site);
}

}  // namespace qft::ptx

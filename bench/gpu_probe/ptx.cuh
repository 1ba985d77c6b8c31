// One function per instruction the probe counts. What a decoder needs has a host twin, so decoding is tested without a
// GPU.
#pragma once
#include <cuda_bf16.h>

#include <cstdint>
#include <cstring>

#define HOST_DEVICE __host__ __device__ __forceinline__

namespace ptx {

// Byte permute: nibble i of `selector` names the byte of (high:low) that becomes byte i. Decoders keep selectors
// below 8.
HOST_DEVICE uint32_t prmt(uint32_t low, uint32_t high, uint32_t selector) {
  uint32_t result = 0;
#ifdef __CUDA_ARCH__
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "r"(selector));
#else
  const uint64_t bytes = uint64_t(high) << 32 | low;
  for (int i = 0; i < 4; i++) result |= uint32_t(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
#endif
  return result;
}

HOST_DEVICE uint32_t and_or(uint32_t value, uint32_t mask, uint32_t base) {
#ifdef __CUDA_ARCH__
  asm("lop3.b32 %0, %0, %1, %2, 0xEA;" : "+r"(value) : "r"(mask), "r"(base));
  return value;
#else
  return (value & mask) | base;
#endif
}

// The codebook value that lane `code` of the warp holds as `mine`. On the host the whole codebook is at hand.
HOST_DEVICE float shuffle(float mine, const float* codebook, uint32_t code) {
#ifdef __CUDA_ARCH__
  return __shfl_sync(0xffffffffu, mine, code);
#else
  return codebook[code];
#endif
}

HOST_DEVICE uint32_t bits(__nv_bfloat162 pair) {
  uint32_t result;
  memcpy(&result, &pair, 4);
  return result;
}

HOST_DEVICE __nv_bfloat162 pair(uint32_t bits) {
  __nv_bfloat162 result;
  memcpy(static_cast<void*>(&result), &bits, 4);
  return result;
}

// sum[16 x 8] += a[16 x 16] * b[16 x 8], the warp's lanes holding the fragments.
__device__ __forceinline__ void mma_bf16(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace ptx

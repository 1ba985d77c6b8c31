// One function per PTX instruction of sm_80. nvcc compiles the instruction, g++ its host twin for the SIMT emulator,
// under the same name and the same contract: kernels above this file contain no asm.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#ifdef __CUDACC__

#include <type_traits>

// The dynamic shared memory as `char* name`, aligned to `alignment` bytes (a literal). One symbol per alignment:
// redeclaring one symbol with two alignments loses the larger.
#define DYN_SMEM(name, alignment)           \
  extern __shared__ __align__(alignment)    \
  char dynamic_shared_memory_##alignment[]; \
  char* const name = dynamic_shared_memory_##alignment

namespace qft::ptx {

// Byte permute: nibble i of `selector` names the byte of high:low (0..7, low first) that becomes byte i. Bit 3 of a
// nibble replicates that byte's sign bit instead; __byte_perm masks it off, this does not.
__device__ __forceinline__ uint32_t prmt(uint32_t low, uint32_t high, uint32_t selector) {
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "r"(selector));
  return result;
}

// Any bitwise function of three words: write it over 0xF0 (a), 0xCC (b) and 0xAA (c), its value is `table`.
// (a & b) | c is 0xEA.
template <int table>
__device__ __forceinline__ uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  static_assert(table >= 0 && table < 256);
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(result) : "r"(a), "r"(b), "r"(c), "n"(table));
  return result;
}

// The 32-bit address of a place in shared memory, as the instructions below take it.
__device__ __forceinline__ uint32_t smem_u32(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Starts a copy of 16 bytes from global to shared memory: the first `source_bytes` (0..16) are read, the others become
// zero, so with 0 `source` is not touched. Both addresses are aligned to 16 bytes. It passes L1 by (.cg) and may land
// at any time until this thread's cp_wait; other threads may read it only after a barrier that follows that wait.
__device__ __forceinline__ void cp_async16(uint32_t destination, const void* source, uint32_t source_bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(source), "r"(source_bytes)
               : "memory");
}

// Closes a group of this thread's copies; a group may be empty, so that every step of a pipeline has one.
__device__ __forceinline__ void cp_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the `pending` youngest of this thread's groups are still in flight.
template <int pending>
__device__ __forceinline__ void cp_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// c[16 x 8] += a[16 x 16] * b[16 x 8] in fp32, T = __nv_bfloat16 or __half, by the 32 lanes of a warp together. Lane
// 4g + q holds, two elements to a register with the lower k in the low half:
//   a[0] = A[g][2q, 2q+1]        a[1] = A[g+8][2q, 2q+1]      b[0] = B[2q, 2q+1][g]
//   a[2] = A[g][2q+8, 2q+9]      a[3] = A[g+8][2q+8, 2q+9]    b[1] = B[2q+8, 2q+9][g]
//   c[0] = C[g][2q]   c[1] = C[g][2q+1]   c[2] = C[g+8][2q]   c[3] = C[g+8][2q+1]
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace qft::ptx

#else
#include "ptx_twin.h"
#endif

// The asynchronous instructions of sm_90a: mbarrier, TMA, the proxy fence and wgmma. nvcc compiles them; g++ gets the
// twins of hopper_twin.h, which also says what is emulated of each.
#pragma once

#include "qft/cuda/ptx.cuh"

#ifdef __CUDACC__

#include <cuda.h>

namespace qft::ptx {

// An mbarrier (8 bytes of shared memory, aligned to 8) whose phases each end after `arrivals` arrivals and as many
// bytes as those arrivals announced.
__device__ __forceinline__ void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes this thread's mbarrier_init visible to the asynchronous proxy; the other threads need a barrier besides.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and announces `bytes` that TMA loads will complete in this phase.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits until the phase of this parity has ended: 0 for the first, third, ... A fresh barrier counts as having ended a
// phase of parity 1.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t ended = 0;
  while (!ended)
    asm volatile(
        "{\n"
        "  .reg .pred ended;\n"
        "  mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
        "  selp.b32 %0, 1, 0, ended;\n"
        "}"
        : "=r"(ended)
        : "r"(barrier), "r"(parity)
        : "memory");
}

// Orders this thread's ordinary accesses to shared memory before what TMA and wgmma do there later.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Starts a load of the box at element (column, row) of a tensor map; elements outside the tensor become zero. Its bytes
// count towards the phase of `barrier` when they have landed. `destination` is aligned to eight rows of the swizzle
// (128 bytes without one).
__device__ __forceinline__ void tma_load_2d(uint32_t destination, const CUtensorMap* map, int column, int row,
                                            uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          destination),
      "l"(map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

// Before the first wgmma, and wherever ordinary code has touched the accumulators since the last.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most `pending` groups are in flight. Before that, neither the accumulators nor the operands are to be
// touched.
template <int pending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// sum[64 x 64] (+)= A[64 x 16] * B[16 x 64] in fp32 from bf16, by the 128 threads of a warpgroup; A and B by shared
// memory descriptors, each K-major (0) or M- resp. N-major (1). Without `accumulate` the old sum is overwritten. Thread
// 32w + 4g + q holds sum[4j + 2h + e] = D[16w + g + 8h][8j + 2q + e].
template <int a_by_m, int b_by_n>
__device__ __forceinline__ void wgmma_m64k16(float (&sum)[32], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile(
      "{\n"
      "  .reg .pred accumulate;\n"
      "  setp.ne.b32 accumulate, %34, 0;\n"
      "  wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16\n"
      "  {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "
      "%23,\n"
      "   %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, accumulate, 1, 1, %35, %36;\n"
      "}"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3]), "+f"(sum[4]), "+f"(sum[5]), "+f"(sum[6]), "+f"(sum[7]),
        "+f"(sum[8]), "+f"(sum[9]), "+f"(sum[10]), "+f"(sum[11]), "+f"(sum[12]), "+f"(sum[13]), "+f"(sum[14]),
        "+f"(sum[15]), "+f"(sum[16]), "+f"(sum[17]), "+f"(sum[18]), "+f"(sum[19]), "+f"(sum[20]), "+f"(sum[21]),
        "+f"(sum[22]), "+f"(sum[23]), "+f"(sum[24]), "+f"(sum[25]), "+f"(sum[26]), "+f"(sum[27]), "+f"(sum[28]),
        "+f"(sum[29]), "+f"(sum[30]), "+f"(sum[31])
      : "l"(a), "l"(b), "r"(int(accumulate)), "n"(a_by_m), "n"(b_by_n));
}

}  // namespace qft::ptx

#else
#include "hopper_twin.h"
#endif

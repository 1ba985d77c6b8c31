// Host twins of samples/ptx90.cuh: mbarrier, two-dimensional TMA loads, the proxy fence and wgmma on two shared memory
// operands. The contracts stand there; hopper.cpp and wgmma.cpp carry them out.
//
// mbarrier: arrivals and announced bytes by phase, waits by parity; arrive releases, wait acquires. Reported: use
// before initialisation, more arrivals than the phase has left, a load on a barrier whose initialisation no fence made
// visible to the asynchronous proxy.
//
// TMA: 2-D loads; 32-, 64-, 128-byte swizzle or none; zeros outside the tensor; completion by bytes. A box lands when
// no thread can go on, or at random. Until then its destination may not be touched, and only the barrier orders it.
//
// Proxies: what a thread writes must be followed by its own fence.proxy.async before wgmma reads it.
//
// wgmma: m64nNk16, bf16 to fp32, N = 8..256, K- and M/N-major operands in all four swizzle modes. From issue to wait
// the accumulators are NaN and may not be written, and neither may the operands; the wait alone orders the reads.
//
// Stricter than the ISA: the fence belongs to the thread that wrote (a consumer's fence would be legal too). Tiles
// start at a multiple of their swizzle's period (a descriptor's base offset is refused) and fill its span. Operands of
// wgmma lie in dynamic shared memory. A block does not end before some thread has waited for its last load.
//
// Laxer: the 128 threads of a warpgroup meet at every wgmma instruction. That orders no memory, so races show; that one
// warp runs ahead of the others of its group does not. One lane of a warp that knows of a write is enough for its wgmma
// to read it. Sums are exact in double; the tensor core truncates.
//
// Not emulated: clusters and multicast; TMA stores, reductions, im2col and other ranks; bulk copies without a tensor
// map; other element types; sparse and register-A wgmma, negated operands; setmaxnreg; time limits of try_wait.
#pragma once

#include <cstdint>

#include "ptx_twin.h"

// The host's stand-in for the driver's opaque descriptor of a matrix [rows][columns] and the box that one load brings.
struct CUtensorMap {
  const char* base;
  int64_t columns, rows, row_bytes;  // row_bytes: from one row to the next
  int box_columns, box_rows;
  int element_bytes;
  int swizzle;          // span in bytes: 32, 64, 128, or 0
  const char* refusal;  // the rule that this map breaks, or null
};

namespace simt {

// Loads by a map that breaks a rule of cuTensorMapEncodeTiled, or one of the emulator's own, fail.
CUtensorMap tensor_map_2d(const void* base, int64_t columns, int64_t rows, int64_t row_bytes, int box_columns,
                          int box_rows, int element_bytes, int swizzle);

void mbarrier_init(uint32_t barrier, uint32_t arrivals);
void fence_mbarrier_init();
void mbarrier_arrive(uint32_t barrier, uint32_t announced_bytes);
void mbarrier_wait(uint32_t barrier, uint32_t parity, Site site);
void fence_proxy_async();
void tma_load_2d(uint32_t destination, const CUtensorMap& map, int column, int row, uint32_t barrier);
void wgmma_fence(Site site);
void wgmma_commit(Site site);
void wgmma_wait(size_t pending, Site site);

struct WgmmaShape {
  int n;
  bool a_by_m, b_by_n;
};
void wgmma(float* sum, uint64_t a, uint64_t b, bool accumulate, WgmmaShape shape, Site site);

}  // namespace simt

namespace qft::ptx {

__forceinline__ void mbarrier_init(uint32_t barrier, uint32_t arrivals) { simt::mbarrier_init(barrier, arrivals); }

__forceinline__ void fence_mbarrier_init() { simt::fence_mbarrier_init(); }

__forceinline__ void mbarrier_arrive(uint32_t barrier) { simt::mbarrier_arrive(barrier, 0); }

__forceinline__ void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes) {
  simt::mbarrier_arrive(barrier, bytes);
}

__forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity, SIMT_SITE) {
  simt::mbarrier_wait(barrier, parity, site);
}

__forceinline__ void fence_proxy_async() { simt::fence_proxy_async(); }

__forceinline__ void tma_load_2d(uint32_t destination, const CUtensorMap* map, int column, int row, uint32_t barrier) {
  simt::tma_load_2d(destination, *map, column, row, barrier);
}

__forceinline__ void wgmma_fence(SIMT_SITE) { simt::wgmma_fence(site); }

__forceinline__ void wgmma_commit(SIMT_SITE) { simt::wgmma_commit(site); }

template <int pending>
__forceinline__ void wgmma_wait(SIMT_SITE) {
  simt::wgmma_wait(pending, site);
}

// N follows from the accumulators: a thread holds N / 2 of the 64 x N sums.
template <int a_by_m, int b_by_n, int values>
__forceinline__ void wgmma_m64k16(float (&sum)[values], uint64_t a, uint64_t b, bool accumulate, SIMT_SITE) {
  static_assert(values % 4 == 0 && values <= 128, "N is a multiple of 8 up to 256");
  simt::wgmma(sum, a, b, accumulate, {2 * values, a_by_m != 0, b_by_n != 0}, site);
}

}  // namespace qft::ptx

// One small kernel per asynchronous instruction of ptx90.cuh, for test_simt_hopper.py.
#include "ptx90.cuh"

namespace ptx = qft::ptx;

namespace {

enum Meddling { kNone, kCopy, kOverwrite, kDiverge, kAbandon };

// `image` becomes shared memory; then `chain` wgmmas on descriptors whose start counts from its beginning. Meddling: a
// copy to the first 16 bytes is under way meanwhile; the image is overwritten before the wait; one warp is elsewhere;
// nobody waits. sums [128][n / 2].
template <int n, int a_by_m, int b_by_n>
__global__ void multiply(const uint4* image, int image_bytes, uint64_t a, uint64_t b, float* sums, int chain,
                         Meddling meddling) {
  DYN_SMEM(shared, 1024);
  for (int i = threadIdx.x; i < image_bytes / 16; i += 128) reinterpret_cast<uint4*>(shared)[i] = image[i];
  ptx::fence_proxy_async();
  __syncthreads();
  const uint64_t start = ptx::smem_u32(shared) >> 4;
  float mine[n / 2];
  for (int j = 0; j < n / 2; j++) mine[j] = sums[threadIdx.x * (n / 2) + j];
  if (meddling == kCopy && threadIdx.x == 0) ptx::cp_async16(ptx::smem_u32(shared), image);
  ptx::cp_commit();
  if (meddling == kDiverge && threadIdx.x >= 96)
    ptx::wgmma_commit();
  else
    ptx::wgmma_fence();
  for (int i = 0; i < chain; i++) {
    ptx::wgmma_m64k16<a_by_m, b_by_n>(mine, a + start, b + start, true);
    ptx::wgmma_commit();
  }
  if (meddling == kOverwrite)
    for (int i = threadIdx.x; i < image_bytes / 16; i += 128)
      reinterpret_cast<uint4*>(shared)[i] = make_uint4(0, 0, 0, 0);
  if (meddling == kAbandon) return;
  ptx::wgmma_wait<0>();
  ptx::cp_wait<0>();
  for (int j = 0; j < n / 2; j++) sums[threadIdx.x * (n / 2) + j] = mine[j];
}

// One box as it lies in shared memory.
__global__ void load_box(const __grid_constant__ CUtensorMap map, int column, int row, uint32_t bytes, char* image) {
  DYN_SMEM(shared, 1024);
  const uint32_t box = ptx::smem_u32(shared), barrier = box + 32768;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
    ptx::tma_load_2d(box, &map, column, row, barrier);
    ptx::mbarrier_arrive_expect_tx(barrier, bytes);
  }
  __syncthreads();
  ptx::mbarrier_wait(barrier, 0);
  for (uint32_t i = threadIdx.x; i < bytes; i += 32) image[i] = shared[i];
}

// Lane 1 reads a box that it has not waited for: at once, or when lane 0 has.
__global__ void peek(const __grid_constant__ CUtensorMap map, uint32_t bytes, bool landed, char* image) {
  DYN_SMEM(shared, 1024);
  const uint32_t box = ptx::smem_u32(shared), barrier = box + 32768;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
    ptx::tma_load_2d(box, &map, 0, 0, barrier);
    ptx::mbarrier_arrive_expect_tx(barrier, bytes);
  }
  __syncthreads();
  if (landed && threadIdx.x == 0) ptx::mbarrier_wait(barrier, 0);
  __shfl_sync(~0u, 0, 0);  // lanes meet, but nothing is ordered
  if (threadIdx.x == 1) *image = *shared;
  ptx::mbarrier_wait(barrier, 0);
}

// Thread `round` leaves mail in its round, everyone arrives and reads it; a second phase lets the next one write.
__global__ void rounds(int* log) {
  DYN_SMEM(shared, 8);
  const uint32_t barrier = ptx::smem_u32(shared);
  int* const mail = reinterpret_cast<int*>(shared + 8);
  if (threadIdx.x == 0) ptx::mbarrier_init(barrier, 64);
  __syncthreads();
  for (int round = 0; round < 5; round++) {
    if (threadIdx.x == unsigned(round)) *mail = 100 + round;
    ptx::mbarrier_arrive(barrier);
    ptx::mbarrier_wait(barrier, 0);
    log[64 * round + threadIdx.x] = *mail;
    ptx::mbarrier_arrive(barrier);
    ptx::mbarrier_wait(barrier, 1);
  }
}

using Multiply = void (*)(const uint4*, int, uint64_t, uint64_t, float*, int, Meddling);
template <int n>
Multiply by_majors(int a_by_m, int b_by_n) {
  constexpr Multiply kernels[2][2] = {{multiply<n, 0, 0>, multiply<n, 0, 1>}, {multiply<n, 1, 0>, multiply<n, 1, 1>}};
  return kernels[a_by_m][b_by_n];
}

}  // namespace

SIMT_EXPORT const char* run_wgmma(int n, int a_by_m, int b_by_n, const void* image, int image_bytes, uint64_t a,
                                  uint64_t b, float* sums, int chain, int meddling) {
  const Multiply kernel = n == 8     ? by_majors<8>(a_by_m, b_by_n)
                          : n == 128 ? by_majors<128>(a_by_m, b_by_n)
                                     : by_majors<256>(a_by_m, b_by_n);
  simt::clear_buffers();
  simt::add_buffer(image, image_bytes, "image");
  simt::add_buffer(sums, 64 * n * 4, "sums", simt::INOUT);
  const size_t shared_bytes = image_bytes + 8192;  // what follows the image, nothing writes
  const bool ok = simt::launch(kernel, 1, 128, shared_bytes, static_cast<const uint4*>(image), image_bytes, a, b, sums,
                               chain, static_cast<Meddling>(meddling));
  return ok ? nullptr : simt::error();
}

SIMT_EXPORT const char* run_tma(const void* matrix, int columns, int rows, int row_bytes, int box_columns, int box_rows,
                                int element_bytes, int swizzle, int column, int row, char* image) {
  const uint32_t bytes = box_columns * box_rows * element_bytes;
  const CUtensorMap map =
      simt::tensor_map_2d(matrix, columns, rows, row_bytes, box_columns, box_rows, element_bytes, swizzle);
  simt::clear_buffers();
  simt::add_buffer(matrix, size_t(rows) * row_bytes, "matrix");
  simt::add_buffer(image, bytes, "image", simt::OUT);
  return simt::launch(load_box, 1, 32, 32768 + 8, map, column, row, bytes, image) ? nullptr : simt::error();
}

SIMT_EXPORT const char* run_peek(const void* matrix, int landed, char* image) {  // 64 x 64 bf16
  const CUtensorMap map = simt::tensor_map_2d(matrix, 64, 64, 128, 64, 64, 2, 128);
  simt::clear_buffers();
  simt::add_buffer(matrix, 64 * 128, "matrix");
  simt::add_buffer(image, 1, "image", simt::OUT);
  return simt::launch(peek, 1, 32, 32768 + 8, map, 64 * 128, landed != 0, image) ? nullptr : simt::error();
}

SIMT_EXPORT const char* run_rounds(int* log) {
  simt::clear_buffers();
  simt::add_buffer(log, 5 * 64 * 4, "log", simt::OUT);
  return simt::launch(rounds, 1, 64, 16, log) ? nullptr : simt::error();
}

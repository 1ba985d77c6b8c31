// One small kernel per property of the emulator; test_simt.py says what each must do.
#include <stdexcept>
#include <string>

#include "probe.h"

// ---- who am I

__global__ void indices(unsigned* out) {  // [threads of the grid, 6]
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  unsigned* mine = out + 6 * (block * blockDim.x * blockDim.y * blockDim.z + thread);
  mine[0] = threadIdx.x, mine[1] = threadIdx.y, mine[2] = threadIdx.z;
  mine[3] = blockIdx.x, mine[4] = blockIdx.y, mine[5] = blockIdx.z;
}
SIMT_EXPORT const char* run_indices(unsigned* out, int gx, int gy, int gz, int bx, int by, int bz) {
  const dim3 grid(gx, gy, gz), block(bx, by, bz);
  return probe({{out, 24u * gx * gy * gz * bx * by * bz, "out", OUT}}, indices, grid, block, 0, out);
}

// The order in which threads come by, before and after a barrier.
__global__ void order(int* turns, int* at) {  // turns [2], at [2, threads of the grid]
  const int me = blockIdx.x * blockDim.x + threadIdx.x;
  at[atomicAdd(&turns[0], 1)] = me;
  __syncthreads();
  at[gridDim.x * blockDim.x + atomicAdd(&turns[1], 1)] = me;
}
SIMT_EXPORT const char* run_order(int* turns, int* at, int blocks, int threads) {
  return probe({{turns, 8, "turns", INOUT}, {at, 8u * blocks * threads, "at", OUT}}, order, blocks, threads, 0, turns,
               at);
}

// ---- warp collectives

template <class T>
__global__ void shuffles(const T* in, T* out, const int* operand, int width, unsigned mask) {  // out [4, 32]
  const int lane = threadIdx.x;
  if (!(mask >> lane & 1)) return;
  const T value = in[lane];
  out[lane] = __shfl_sync(mask, value, operand[lane], width);
  out[32 + lane] = __shfl_xor_sync(mask, value, operand[0], width);
  out[64 + lane] = __shfl_down_sync(mask, value, operand[0], width);
  out[96 + lane] = __shfl_up_sync(mask, value, operand[0], width);
}
SIMT_EXPORT const char* run_shuffles(const int* in, int* out, const int* operand, int width, unsigned mask) {
  return probe({{in, 128, "in", IN}, {out, 512, "out", INOUT}, {operand, 128, "operand", IN}}, shuffles<int>, 1, 32, 0,
               in, out, operand, width, mask);
}
SIMT_EXPORT const char* run_shuffles_wide(const double2* in, double2* out, const int* operand, int width) {
  return probe({{in, 512, "in", IN}, {out, 2048, "out", INOUT}, {operand, 128, "operand", IN}}, shuffles<double2>, 1,
               32, 0, in, out, operand, width, ~0u);
}

__global__ void votes(const int* in, unsigned* out) {  // out [9, threads]
  const int thread = threadIdx.x, threads = blockDim.x;
  const int value = in[thread];
  unsigned results[9];
  results[0] = __ballot_sync(~0u, value & 1);
  results[1] = static_cast<unsigned>(__any_sync(~0u, value > 90));
  results[2] = static_cast<unsigned>(__all_sync(~0u, value < 99));
  results[3] = static_cast<unsigned>(__reduce_add_sync(~0u, value));
  results[4] = static_cast<unsigned>(__reduce_min_sync(~0u, value - 50));
  results[5] = static_cast<unsigned>(__reduce_max_sync(~0u, value - 50));
  results[6] = __reduce_and_sync(~0u, static_cast<unsigned>(value) | 3);
  results[7] = __reduce_or_sync(~0u, static_cast<unsigned>(value));
  results[8] = __reduce_xor_sync(~0u, static_cast<unsigned>(value));
  for (int i = 0; i < 9; i++) out[i * threads + thread] = results[i];
}
SIMT_EXPORT const char* run_votes(const int* in, unsigned* out, int threads) {
  return probe({{in, 4u * threads, "in", IN}, {out, 36u * threads, "out", OUT}}, votes, 1, threads, 0, in, out);
}

// A warp splits over two places: right for a shuffle, wrong for what PTX calls .aligned and for barriers.
__global__ void two_places(int* out, int kind) {
  const int lane = threadIdx.x;
  const auto nothing = [](void**, uint32_t) {};
  int value = 0;
  if (lane < 16) {
    if (kind == 0) value = __shfl_xor_sync(~0u, lane, 16);
    if (kind == 1) simt::collective("mma", ~0u, true, nullptr, nothing, {"here", 1});
    if (kind == 2) __syncthreads();
  } else {
    if (kind == 0) value = __shfl_xor_sync(~0u, lane, 16);
    if (kind == 1) simt::collective("mma", ~0u, true, nullptr, nothing, {"there", 2});
    if (kind == 2) __syncthreads();
  }
  if (kind == 3) simt::barrier({"here", 3}, 16, 32);
  if (kind == 4) simt::barrier({"here", 4}, 1, 33);
  if (kind == 5) __builtin_assume(lane < 31);
  out[lane] = value;
}
SIMT_EXPORT const char* run_two_places(int* out, int kind) {
  return probe({{out, 128, "out", OUT}}, two_places, 1, 32, 0, out, kind);
}

// ---- atomics

template <class T>
__global__ void atomics(T* cells, T* old) {  // cells [11], old [11, threads]
  const int thread = threadIdx.x, threads = blockDim.x;
  const T value = static_cast<T>((thread * 7 + 3) % 32);
  old[0 * threads + thread] = atomicAdd(&cells[0], value);
  old[1 * threads + thread] = atomicSub(&cells[1], value);
  old[2 * threads + thread] = atomicMax(&cells[2], value);
  old[3 * threads + thread] = atomicMin(&cells[3], value);
  old[4 * threads + thread] = atomicExch(&cells[4], value);
  old[5 * threads + thread] = atomicAnd(&cells[5], value | 64);
  old[6 * threads + thread] = atomicOr(&cells[6], value);
  old[7 * threads + thread] = atomicXor(&cells[7], value);
  old[8 * threads + thread] = atomicInc(&cells[8], 9);
  old[9 * threads + thread] = atomicDec(&cells[9], 9);
  old[10 * threads + thread] = atomicCAS(&cells[10], thread, thread + 1);
}
SIMT_EXPORT const char* run_atomics(unsigned* cells, unsigned* old, int threads) {
  return probe({{cells, 44, "cells", INOUT}, {old, 44u * threads, "old", OUT}}, atomics<unsigned>, 1, threads, 0, cells,
               old);
}
__global__ void add_floats(float* f, double* d) {
  atomicAdd(f, 1);  // an int, as CUDA's overload takes it
  atomicAdd(d, 0.5);
}
SIMT_EXPORT const char* run_add_floats(float* f, double* d) {
  return probe({{f, 4, "f", INOUT}, {d, 8, "d", INOUT}}, add_floats, 2, 64, 0, f, d);
}

// ---- shared memory

template <int align>
__global__ void dynamic_address(uint64_t* out) {
  DYN_SMEM(memory, align);
  memory[threadIdx.x] = 1;
  if (threadIdx.x) return;
  const uint32_t address = simt::smem_u32(memory + 5);
  out[0] = reinterpret_cast<uint64_t>(memory);
  out[1] = simt::smem_u32(memory);
  out[2] = address;
  out[3] = simt::smem_ptr(address, 1) == memory + 5;
}
SIMT_EXPORT const char* run_dynamic_address(uint64_t* out, int align, int bytes) {
  const auto kernel = align == 16     ? dynamic_address<16>
                      : align == 128  ? dynamic_address<128>
                      : align == 1024 ? dynamic_address<1024>
                                      : dynamic_address<4096>;
  return probe({{out, 32, "out", OUT}}, kernel, 1, 64, bytes, out);
}

extern __shared__ int declared[];  // CUDA's own spelling needs a definition of fixed size on the host
__global__ void reverse(const int* in, int* out, int n) {
  __shared__ int64_t kept[2];
  declared[threadIdx.x] = in[threadIdx.x];
  if (threadIdx.x < 2) kept[threadIdx.x] = in[threadIdx.x] * 2;
  __syncthreads();
  out[threadIdx.x] = declared[n - 1 - threadIdx.x] + static_cast<int>(kept[threadIdx.x % 2]);
}
thread_local int declared[256];
SIMT_EXPORT const char* run_reverse(const int* in, int* out, int n) {
  return probe({{in, 4u * n, "in", IN}, {out, 4u * n, "out", OUT}}, reverse, 1, n, 0, in, out, n);
}

// Arrays of 16-bit floats, in a template as in a plain kernel: g++ gives them a constructor's guard.
template <int n>
__global__ void shared_halves(const __half* in, float* out) {
  __shared__ __half tile[n];
  __shared__ __nv_bfloat162 pairs[n];
  tile[threadIdx.x] = in[threadIdx.x];
  pairs[threadIdx.x] = __floats2bfloat162_rn(in[threadIdx.x], 1);
  __syncthreads();
  out[blockIdx.x * n + threadIdx.x] =
      __half2float(tile[n - 1 - threadIdx.x]) + __high2float(pairs[n - 1 - threadIdx.x]);
}
SIMT_EXPORT const char* run_shared_halves(const __half* in, float* out) {
  return probe({{in, 128, "in", IN}, {out, 512, "out", OUT}}, shared_halves<64>, 2, 64, 0, in, out);
}

__global__ void poison(float* out, int never) {
  DYN_SMEM(memory, 16);
  __shared__ float kept;
  if (never) kept = 0;  // g++ takes a variable that nobody writes for the constant 0
  out[0] = *reinterpret_cast<float*>(memory);
  out[1] = kept;
  out[2] = __bfloat162float(*reinterpret_cast<__nv_bfloat16*>(memory + 4));
  out[3] = __half2float(*reinterpret_cast<__half*>(memory + 6));
}
SIMT_EXPORT const char* run_poison(float* out, int never) {
  return probe({{out, 16, "out", OUT}}, poison, 1, 1, 16, out, never);
}

__global__ void unset_local(float* out, int at) {
  float local[8];
  local[7] = 1;
  *out = local[at];
}
SIMT_EXPORT const char* run_unset_local(float* out, int at) {
  return probe({{out, 4, "out", OUT}}, unset_local, 1, 1, 0, out, at);
}

// Through a pointer that g++ knows nothing of, so that the array's type cannot give it away.
__global__ void past_static(int* out, int at) {
  __shared__ __align__(16) char small[20];
  for (char& c : small) c = 1;
  char* p = small;
  asm("" : "+r"(p));
  *out = static_cast<int>(*reinterpret_cast<int64_t*>(p + at));
}
SIMT_EXPORT const char* run_past_static(int* out, int at) {
  return probe({{out, 4, "out", OUT}}, past_static, 1, 1, 0, out, at);
}

__global__ void two_alignments(int* out) {
  DYN_SMEM(a, 16);
  DYN_SMEM(b, 32);
  *out = a == b;
}
SIMT_EXPORT const char* run_two_alignments(int* out) {
  return probe({{out, 4, "out", OUT}}, two_alignments, 1, 1, 64, out);
}

// ---- memory order inside a block, by a flag

template <int fences>
__global__ void flag(int* data, int* ready) {  // fences 0: none, 1: of the block, 2: of the device
  if (threadIdx.x == 0) {
    *data = 42;
    if (fences == 1) __threadfence_block();
    if (fences == 2) __threadfence();
    atomicExch(ready, 1);
  } else if (threadIdx.x == 32) {
    while (atomicAdd(ready, 0) == 0) __nanosleep(20);
    *data += 1;
  }
}
SIMT_EXPORT const char* run_flag(int* data, int* ready, int fences) {
  return probe({{data, 4, "data", OUT}, {ready, 4, "ready", INOUT}},
               fences == 0   ? flag<0>
               : fences == 1 ? flag<1>
                             : flag<2>,
               1, 64, 0, data, ready);
}

// The same over three warps: what the second has learnt of the first it passes on to the third.
__global__ void flag_chain(int* data, int* ready) {
  const int warp = threadIdx.x / 32;
  if (threadIdx.x % 32) return;
  if (warp == 0) *data = 42;
  if (warp > 0)
    while (atomicAdd(&ready[warp - 1], 0) == 0) __nanosleep(20);
  if (warp == 2) *data += 1;
  __threadfence_block();
  atomicExch(&ready[warp], 1);
}
SIMT_EXPORT const char* run_flag_chain(int* data, int* ready) {
  return probe({{data, 4, "data", OUT}, {ready, 12, "ready", INOUT}}, flag_chain, 1, 96, 0, data, ready);
}

// What a thread wrote after its fence is not covered by it.
__global__ void late_write(int* data, int* count, int* out) {
  if (blockIdx.x == 0) {
    __threadfence();
    data[0] = 1;
    atomicAdd(count, 1);
  } else if (atomicAdd(count, 1) == 1) {
    *out = data[0];
  }
}
SIMT_EXPORT const char* run_late_write(int* data, int* count, int* out) {
  return probe({{data, 4, "data", INOUT}, {count, 4, "count", INOUT}, {out, 4, "out", INOUT}}, late_write, 2, 1, 0,
               data, count, out);
}

// Block 0 hands over to thread 0 of block 1; another thread of block 1 reads, behind a barrier or not.
template <bool barrier>
__global__ void overheard(int* data, int* count, int* out) {
  if (blockIdx.x == 0) {
    if (threadIdx.x == 0) {
      *data = 5;
      __threadfence();
      atomicAdd(count, 1);
    }
    return;
  }
  if (threadIdx.x == 0) atomicAdd(count, 1);
  if (barrier) __syncthreads();
  if (threadIdx.x == 32) *out = *data;
}
SIMT_EXPORT const char* run_overheard(int* data, int* count, int* out, int barrier) {
  return probe({{data, 4, "data", OUT}, {count, 4, "count", INOUT}, {out, 4, "out", OUT}},
               barrier ? overheard<true> : overheard<false>, 2, 64, 0, data, count, out);
}

// Every thread writes, thread 0 fences and counts: right only with a barrier between.
template <bool barrier>
__global__ void whole_block(int* parts, unsigned* count, int* sum) {
  __shared__ bool last;
  parts[blockIdx.x * 64 + threadIdx.x] = threadIdx.x;
  if (barrier) __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(count, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (last && threadIdx.x == 1) {
    int total = 0;
    for (unsigned i = 0; i < gridDim.x * 64; i++) total += parts[i];
    *sum = total;
  }
}
SIMT_EXPORT const char* run_whole_block(int* parts, unsigned* count, int* sum, int barrier) {
  return probe({{parts, 4u * 3 * 64, "parts", OUT}, {count, 4, "count", INOUT}, {sum, 4, "sum", OUT}},
               barrier ? whole_block<true> : whole_block<false>, 3, 64, 0, parts, count, sum);
}

// Block 0 tells block 1 by one counter, block 1 tells block 2 by another: what block 0 wrote has come to block 2 only
// if block 1 passes it on. Blocks that find their turn has not come leave *out alone.
__global__ void relay(int* data, int* first, int* second, int* out, int fences) {
  if (blockIdx.x == 0) {
    *data = 5;
    __threadfence();
    atomicAdd(first, 1);
  } else if (blockIdx.x == 1) {
    if (atomicAdd(first, 0) == 0) return;
    if (fences > 1) __threadfence();
    atomicAdd(second, 1);
  } else if (atomicAdd(second, 0) == 1) {
    *out = *data;
  }
}
SIMT_EXPORT const char* run_relay(int* data, int* first, int* second, int* out, int fences) {
  return probe(
      {{data, 4, "data", OUT}, {first, 4, "first", INOUT}, {second, 4, "second", INOUT}, {out, 4, "out", INOUT}}, relay,
      3, 1, 0, data, first, second, out, fences);
}

// A counter is cleared by the thread that then counts: the others' atomics are not ordered after the clearing.
__global__ void cleared_late(int* out) {
  __shared__ int count;
  if (threadIdx.x == 0) count = 0;
  if (threadIdx.x % 32 == 0) atomicAdd(&count, 1);
  __syncthreads();
  if (threadIdx.x == 0) *out = count;
}
SIMT_EXPORT const char* run_cleared_late(int* out) {
  return probe({{out, 4, "out", OUT}}, cleared_late, 1, 64, 0, out);
}

// Warps 0 and 1 read what warp 2 then writes; a barrier orders only one of the two before it.
__global__ void two_readers(int* x, int* out, int ordered_warp) {
  const int warp = threadIdx.x / 32;
  if (warp < 2 && threadIdx.x % 32 == 0) out[warp] = *x;
  if (warp == ordered_warp || warp == 2) simt::barrier({__FILE__, __LINE__}, 1, 64);
  if (threadIdx.x == 64) *x = 1;
}
SIMT_EXPORT const char* run_two_readers(int* x, int* out, int ordered_warp) {
  return probe({{x, 4, "x", INOUT}, {out, 8, "out", OUT}}, two_readers, 1, 96, 0, x, out, ordered_warp);
}

// Block 1 reads and then writes what block 0 has read.
__global__ void read_then_write(int* x, int* out) {
  out[blockIdx.x] = x[0];
  if (blockIdx.x == 1) x[0] = 7;
}
SIMT_EXPORT const char* run_read_then_write(int* x, int* out) {
  return probe({{x, 4, "x", INOUT}, {out, 8, "out", OUT}}, read_then_write, 2, 1, 0, x, out);
}

// Two launches over the same memory: the end of the first orders all it did.
__global__ void increment(int* x) { x[threadIdx.x] += 1; }
SIMT_EXPORT const char* run_two_launches(int* x) {
  simt::clear_buffers();
  simt::add_buffer(x, 256, "x", INOUT);
  for (int i = 0; i < 2; i++)
    if (!simt::launch(increment, 1, 64, 0, x)) return simt::error();
  return nullptr;
}

// ---- asynchronous copies

// Three groups of 16 bytes by one thread, a wait that leaves `pending` of them, and a look at the one named.
__global__ void groups(const int* in, int* out, int pending, int look) {  // in [12], out [4]
  DYN_SMEM(memory, 16);
  for (int i = 0; i < 3; i++) {
    simt::cp_async(simt::smem_u32(memory + 16 * i), in + 4 * i, 16, 16);
    simt::cp_commit();
  }
  simt::cp_wait(pending);
  for (int i = 0; i < 4; i++) out[i] = reinterpret_cast<int*>(memory)[4 * look + i];
  simt::cp_wait(0);
}
SIMT_EXPORT const char* run_groups(const int* in, int* out, int pending, int look) {
  return probe({{in, 48, "in", IN}, {out, 16, "out", OUT}}, groups, 1, 1, 48, in, out, pending, look);
}

// The wait comes after the barrier: it says nothing to the other threads.
__global__ void late_wait(const int* in, int* out) {
  DYN_SMEM(memory, 16);
  if (threadIdx.x == 0) simt::cp_async(simt::smem_u32(memory), in, 4, 4);
  if (threadIdx.x == 0) simt::cp_commit();
  __syncthreads();
  if (threadIdx.x == 0) simt::cp_wait(0);
  if (threadIdx.x == 32) *out = *reinterpret_cast<int*>(memory);
}
SIMT_EXPORT const char* run_late_wait(const int* in, int* out) {
  return probe({{in, 4, "in", IN}, {out, 4, "out", OUT}}, late_wait, 1, 64, 16, in, out);
}

// ---- what a launch may do to the process

__global__ void wild(int* out, int kind) {
  if (threadIdx.x != 3) return;
  DYN_SMEM(memory, 16);
  volatile char* beyond = memory + 65536;
  volatile int zero = 0;
  if (kind == 0) *beyond = 1;
  if (kind == 1) *reinterpret_cast<volatile int*>(8) = 1;
  if (kind == 2) *out = 7 / zero;
  if (kind == 3) __trap();
  if (kind == 4) throw 1;
}
SIMT_EXPORT const char* run_wild(int* out, int kind) {
  return probe({{out, 4, "out", INOUT}}, wild, 1, 32, 64, out, kind);
}

int dig(volatile int* out, int depth) {
  volatile char room[1024];
  room[depth % 1024] = 1;
  return depth == 0 ? *out : dig(out, depth - 1) + room[depth % 1024];
}
__global__ void recurse(int* out, int depth) { *out = dig(out, depth); }
SIMT_EXPORT const char* run_recurse(int* out, int depth) {
  return probe({{out, 4, "out", INOUT}}, recurse, 1, 1, 0, out, depth);
}

__global__ void spin(int* flag) {
  while (atomicAdd(flag, 0) == 0) __nanosleep(100);
}
SIMT_EXPORT const char* run_spin(int* flag) { return probe({{flag, 4, "flag", INOUT}}, spin, 1, 32, 0, flag); }

__global__ void early_return(int* out) {
  __shared__ int sum;
  if (threadIdx.x >= 40) return;
  if (threadIdx.x == 0) sum = 5;
  __syncthreads();
  out[threadIdx.x] = sum;
}
SIMT_EXPORT const char* run_early_return(int* out) {
  return probe({{out, 160, "out", OUT}}, early_return, 1, 64, 0, out);
}

// Copies that g++ turns into calls of memcpy and memset.
struct Large {
  int numbers[64];
};
__global__ void large_copy(const Large* in, Large* out, int extra) {
  memcpy(out, in, sizeof(Large) + extra);
  if (extra < 0) memset(out, 0, sizeof(Large) - extra);
}
SIMT_EXPORT const char* run_large_copy(const Large* in, Large* out, int extra) {
  return probe({{in, sizeof *in, "in", IN}, {out, sizeof *out, "out", OUT}}, large_copy, 1, 1, 0, in, out, extra);
}

// Host code around a launch may throw.
SIMT_EXPORT const char* run_throwing(int* out) {
  try {
    if (probe({{out, 4, "out", INOUT}}, wild, 1, 32, 64, out, 1)) throw std::runtime_error(simt::error());
  } catch (const std::runtime_error& e) {
    static std::string kept;
    kept = std::string("caught: ") + e.what();
    return kept.c_str();
  }
  return nullptr;
}

SIMT_EXPORT const char* run_overlap(int* x, int second_is_read) {
  return probe({{x, 64, "whole", second_is_read ? IN : INOUT}, {x + 4, 4, "part", IN}}, increment, 1, 1, 0, x + 100);
}
SIMT_EXPORT const char* run_shape(int blocks, int threads, size_t smem) {
  static int nothing;
  return probe({{&nothing, 4, "nothing", INOUT}}, spin, blocks, threads, smem, &nothing);
}
SIMT_EXPORT size_t count_unwritten(const void* p) { return simt::unwritten(p); }

__global__ void write_some(char* out, int n) { out[threadIdx.x] = static_cast<char>(n); }
SIMT_EXPORT const char* run_write_some(char* out, int bytes, int threads) {
  return probe({{out, static_cast<size_t>(bytes), "out", OUT}}, write_some, 1, threads, 0, out, 1);
}

__global__ void wide_read(const uint4* in, uint4* out) { out[threadIdx.x] = in[threadIdx.x]; }
SIMT_EXPORT const char* run_wide_read(const char* in, char* out, int bytes, int threads) {
  return probe({{in, static_cast<size_t>(bytes), "in", IN}, {out, 4096, "out", OUT}}, wide_read, 1, threads, 0,
               reinterpret_cast<const uint4*>(in), reinterpret_cast<uint4*>(out));
}

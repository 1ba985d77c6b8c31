// What a test program asks of the emulator: how to schedule, which memory a kernel may touch, launch, and the verdict.
//
//   simt::clear_buffers();
//   simt::add_buffer(x, n * 4, "x");
//   simt::add_buffer(y, n * 4, "y", simt::OUT);
//   if (!simt::launch(scale<4>, grid, block, smem_bytes, x, y, n)) puts(simt::error());
//   if (simt::unwritten(y)) puts("y is not fully written");
//
// One launch at a time per library; launches are calls that return when the kernel is done.
#pragma once

#include <cstddef>
#include <cstdint>
#include <tuple>
#include <utility>

#include "runtime.h"
#include "vector_types.h"

// Libraries hide everything but what is marked so.
#define SIMT_EXPORT extern "C" __attribute__((visibility("default")))

namespace simt {

enum Order {
  ASCENDING,   // the lowest ready lane of the lowest warp runs on until it blocks: one warp runs far ahead
  DESCENDING,  // the same from the other end, blocks included
  BREADTH,     // round robin
  RANDOM,      // lanes, warps and blocks drawn by `seed`
};

struct Config {
  Order order = ASCENDING;
  uint64_t seed = 1;                // of RANDOM, of preemption and of the moments when copies land
  bool shadow = true;               // judge initialisation and races; the accesses come from kernels built with hooks
  int preempt = 0;                  // with hooks: yield at one of `preempt` memory accesses; 0: never
  bool lazy_async = true;           // asynchronous copies land at the last legal moment; false: at random ones
  bool early_exit_ok = false;       // threads may return while others still use __syncthreads
  uint64_t max_steps = 1ull << 31;  // yields in one launch after which a spin-wait is taken to be endless
  int multiprocessors = 4;          // what a launch helper is told when it sizes a grid
};
extern Config config;

struct Stats {
  uint64_t switches, accesses, collectives, barriers, blocks;
};
extern Stats stats;  // summed over launches until the caller clears it

enum Use { IN, OUT, INOUT };  // read only; uninitialised until written; initialised and written

// Lets kernels touch bytes [p, p + bytes). Anything not registered is an illegal address.
void add_buffer(const void* p, size_t bytes, const char* name, Use use = IN);
void clear_buffers();
size_t unwritten(const void* output);  // bytes of the buffer that starts here that no thread wrote; 0 without shadow

// Runs body(args) once per thread. False: error() tells why. Dynamic shared memory up to 232448 bytes (227 KiB).
bool run(dim3 grid, dim3 block, size_t smem, void (*body)(const void* args), const void* args);
const char* error();  // of the last launch, "" if there is none

template <class... P>
struct Call {
  void (*kernel)(P...);
  std::tuple<P...> args;

  template <size_t... I>
  SIMT_NOSAN void unpack(std::index_sequence<I...>) const {
    kernel(std::get<I>(args)...);
  }
  SIMT_NOSAN static void invoke(const void* call) {
    static_cast<const Call*>(call)->unpack(std::index_sequence_for<P...>());
  }
};

template <class... P, class... A>
bool launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, A... args) {
  const Call<P...> call{kernel, std::tuple<P...>(static_cast<P>(args)...)};
  return run(grid, block, smem, Call<P...>::invoke, &call);
}

}  // namespace simt

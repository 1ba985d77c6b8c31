// The inside of the emulator, for the files that make it up and for parts that add instructions with a life of their
// own (mbarrier, TMA, wgmma). Kernels include simt.h, test programs host.h.
//
// One block runs at a time; its threads are fibers of one OS thread, so no state here needs a lock, and nothing
// changes between two calls that can switch: yield, park, collective, barrier, and any checked access when
// config.preempt is set.
//
// A part is a .cpp file that
//   - keeps its state in static variables and clears it in Part::reset,
//   - waits with park(op, site) in a loop on its own condition and wakes with wake(thread),
//   - passes memory order along: release(current, clock) where a thread hands over, acquire(current, clock) where
//     one picks up; an engine that acts by itself stamps its work as agent engine(i) and advance()s that agent,
//   - checks the memory it touches: access() for what a thread does now; for what an engine does later, the cells of
//     shared_cells(p, n): set kInFlight while it may write, count `reading` while it may read,
//   - registers itself:  static const Part part({.reset = ..., .progress = ...});
#pragma once

#include <cstdint>
#include <string>

#include "clocks.h"
#include "fiber.h"
#include "host.h"
#include "runtime.h"
#include "shadow.h"
#include "vector_types.h"

namespace simt {

// ---- threads

enum class State : uint8_t { ready, in_collective, in_barrier, parked, done };

struct Fiber {
  Context context;
  State state;
  // while it waits: in what, where, and what the others need to know of it
  const char* op;
  Site site;
  uint32_t mask;
  bool aligned;
  void* arg;
  int barrier;
};
extern Fiber fibers[kMaxThreads];

extern int current;            // thread whose fiber runs (linear in the block); -1: the scheduler, or host code
extern int threads;            // of the running block
extern uint32_t launch_begin;  // blocks are numbered from 1 over all launches: here, the present launch's first
extern uint32_t block_number;  // launch_begin + the linear index of the running block

// The built-in variables; kernels see them as constants (simt.h).
extern uint3 thread_index __asm__("simt_threadIdx");
extern uint3 block_index __asm__("simt_blockIdx");
extern dim3 block_dim __asm__("simt_blockDim");
extern dim3 grid_dim __asm__("simt_gridDim");

inline int engine(int i) { return threads + i; }  // the agent of asynchronous engine i < kEngines
std::string agent_name(int agent);                // "thread 12", "asynchronous engine 0"

void park(const char* op, Site site);  // leaves until someone wakes this thread; `op` shows in the deadlock picture
void wake(int thread);                 // makes a waiting thread ready; in RANDOM order the draw comes later
void wake_lanes(int first_thread, uint32_t mask);  // the same for lanes of a warp, in the order of the schedule

// ---- parts

struct Part {
  struct Hooks {
    void (*reset)() = nullptr;             // a block starts; clocks are fresh, shared memory is poisoned
    bool (*progress)() = nullptr;          // nobody can run (or, when copies land at random, now and then): do one
                                           // pending step, as the scheduler (current == -1); false: there is none
    void (*exited)(int thread) = nullptr;  // a thread returns from the kernel; may fail()
  };
  explicit Part(const Hooks& hooks);
};

// ---- reports

std::string where(const void* pc);             // " at file:line", inlined callers after " < "
std::string where_offset(uint32_t module_pc);  // the same for the pc of a cell
uint32_t module_offset(const void* pc);

// An access seen at `pc` (a return address): bounds, initialisation, races.
void access_at(const void* p, size_t n, Kind kind, const void* pc);

uint32_t random32();  // from config.seed: the same seed gives the same run

}  // namespace simt

// A thread of the emulated block: a stack of its own and a switch between stacks.
#pragma once

#include <cstddef>

#ifdef SIMT_UCONTEXT
#include <ucontext.h>
#endif

namespace simt {

#ifdef SIMT_UCONTEXT
struct Context {
  ucontext_t saved;
};
#else
struct Context {
  void* stack_pointer;
};
#endif

constexpr int kMaxThreads = 1024;
constexpr size_t kStackBytes = 128 << 10, kGuardBytes = 4096;

// Stacks of threads 0..count-1 exist after this; each ends in a guard page below.
void reserve_stacks(int count);
bool in_stacks(const void* p);  // of any thread, guard pages included
extern char* stacks;            // one reservation for all: thread t's slot is its guard page and then its stack
constexpr size_t kSlotBytes = kGuardBytes + kStackBytes;
inline char* stack_of(int thread) { return stacks + thread * kSlotBytes + kGuardBytes; }  // lowest usable byte

void prepare(Context& context, int thread,
             void (*entry)());  // the next switch_to(context) calls entry, which never returns
void switch_to(Context& from, Context& to);

}  // namespace simt

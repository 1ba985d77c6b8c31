#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>

namespace simt {

char* stacks = nullptr;

namespace {

int usable = 0;  // stacks that have been made readable and writable: only as many as the largest block asked for

}  // namespace

void reserve_stacks(int count) {
  if (!stacks) {
    void* p = mmap(nullptr, kMaxThreads * kSlotBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) abort();
    stacks = static_cast<char*>(p);
  }
  for (; usable < count; usable++)
    if (mprotect(stack_of(usable), kStackBytes, PROT_READ | PROT_WRITE)) abort();
}

bool in_stacks(const void* p) {
  return reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(stacks) < kMaxThreads * kSlotBytes;
}

#ifdef SIMT_UCONTEXT

void prepare(Context& context, int thread, void (*entry)()) {
  getcontext(&context.saved);
  context.saved.uc_stack.ss_sp = stack_of(thread);
  context.saved.uc_stack.ss_size = kStackBytes;
  context.saved.uc_link = nullptr;
  makecontext(&context.saved, entry, 0);
}

void switch_to(Context& from, Context& to) { swapcontext(&from.saved, &to.saved); }

#else

#ifndef __x86_64__
#error "the context switch is written for x86-64: define SIMT_UCONTEXT elsewhere (about 20 times slower)"
#endif

// Saves what the System V ABI lets a callee change nothing of, and continues the other stack where it saved the same.
// (The rounding and mask bits of MXCSR and the x87 control word are left alone: kernels do not set them.)
asm(R"(
  .text
  .local simt_switch
  .type simt_switch,@function
simt_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp,(%rdi)
  mov %rsi,%rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
  .size simt_switch,.-simt_switch
)");
extern "C" __attribute__((visibility("hidden"))) void simt_switch(void** save, void* load);

void prepare(Context& context, int thread, void (*entry)()) {
  void** top =
      reinterpret_cast<void**>(stack_of(thread) + kStackBytes) - 2;  // ret leaves rsp = 16n + 8, as a call does
  top[0] = reinterpret_cast<void*>(entry);
  top[1] = nullptr;  // entry's return address: unwinders stop here
  context.stack_pointer = top - 6;
}

void switch_to(Context& from, Context& to) { simt_switch(&from.stack_pointer, to.stack_pointer); }

#endif

}  // namespace simt

#include "faults.h"

#include <pthread.h>
#include <ucontext.h>

#include <csetjmp>
#include <csignal>
#include <cstdio>

#include "memory.h"
#include "scheduler.h"

namespace simt {

namespace {

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT};
constexpr int kCount = sizeof kSignals / sizeof *kSignals;

struct sigaction previous[kCount];
pthread_t launcher;
sigjmp_buf resume;

struct Fault {
  int signal;
  const void *address, *pc;  // pc: behind the instruction, as a return address is; null: unknown
} fault;

void put_back() {
  for (int i = 0; i < kCount; i++) sigaction(kSignals[i], &previous[i], nullptr);
}

void on_signal(int signal, siginfo_t* info, void* context) {
  if (current < 0 || !pthread_equal(pthread_self(), launcher)) {
    put_back();  // not a kernel's: the instruction faults again, under the process's own handler
    return;
  }
  fault = {signal, info->si_addr, nullptr};
#ifdef __x86_64__
  fault.pc = reinterpret_cast<const char*>(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]) + 1;
#else
  (void)context;
#endif
  siglongjmp(resume, 1);
}

const char* describe() {
  if (fault.signal == SIGILL) return "illegal instruction";
  if (fault.signal == SIGABRT) return "aborted (a failed assert, or an exception that leaves the kernel)";
  if (fault.signal == SIGFPE) return "integer division by zero";
  if (near_dynamic_shared(fault.address)) return "out of bounds: dynamic shared memory (guard page)";
  if (in_stacks(fault.address)) return "stack overflow";
  return "illegal address";
}

}  // namespace

void run_guarded(void (*work)()) {
  static char alternate[65536];  // a handler cannot run on a stack that has overflowed
  stack_t stack{}, previous_stack;
  stack.ss_sp = alternate;
  stack.ss_size = sizeof alternate;
  sigaltstack(&stack, &previous_stack);
  launcher = pthread_self();
  struct sigaction action{};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  for (int i = 0; i < kCount; i++) sigaction(kSignals[i], &action, &previous[i]);
  if (!sigsetjmp(resume, 1)) {
    work();
  } else {
    std::string text = who() + ": " + describe();
    if (fault.signal != SIGABRT) {  // whose address is a process and whose instruction the C library's
      char address[32];
      snprintf(address, sizeof address, ", %p", fault.address);
      text += address + (fault.pc ? where(fault.pc) : "");
    }
    set_failure(text);
    current = -1;
  }
  put_back();
  sigaltstack(&previous_stack, nullptr);
}

}  // namespace simt

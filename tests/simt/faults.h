// Faults of kernel code (guard pages, wild pointers, integer division) as failures of the launch.
#pragma once

namespace simt {

// Runs work() with our handlers in place of the process's, and puts those back. A fault in a kernel ends work().
void run_guarded(void (*work)());

}  // namespace simt

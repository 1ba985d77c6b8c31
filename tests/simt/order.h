// Memory order through fences and atomics, within a block and between blocks.
#pragma once

#include <cstdint>

namespace simt {

void reset_launch_order();  // a launch starts
void reset_order();         // a block starts

// An atomic by the current thread at this address: learns what earlier atomics there passed on, and passes on what
// the thread's last fence covers.
void order_atomic(uintptr_t address);

// Whether what agent `agent` of another block of this launch did at `time` comes before what the current thread does.
bool ordered_between_blocks(uint32_t block, int agent, uint32_t time);

}  // namespace simt

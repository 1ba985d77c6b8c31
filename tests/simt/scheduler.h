// Who runs next, and what comes of it: what the emulator's own files share. Parts use engine.h.
#pragma once

#include <string>

#include "engine.h"

namespace simt {

struct Kernel {
  void (*body)(const void* args) = nullptr;  // null: nothing is being launched
  const void* args = nullptr;
};
extern Kernel kernel;

void seed_schedule();         // a launch starts
void run_block(size_t smem);  // the block that block_index names, to its end or the first failure
void leave();                 // hands over to the scheduler; returns when this thread is picked again
void shuffle(int* items, int count);

void set_failure(std::string text);
const std::string& failure();  // of this launch; empty: none
std::string who();             // "block (0,0,0) thread 28 (warp 0 lane 28)"

uint32_t warp_mask_of(int first_thread);  // the lanes that the warp which starts with this thread has

void reset_collectives();  // a block starts
void thread_returned();    // barriers no longer wait for `current`
extern int returned;       // threads of the block that have

}  // namespace simt

// "Write, fence, atomic on X" comes before "a later atomic on X, read": the last-block pattern, and a flag between two
// warps. A fence at the reading side is not asked for: CUDA's own samples leave it out.
#include "order.h"

#include <map>
#include <unordered_map>
#include <vector>

#include "scheduler.h"

namespace simt {

namespace {

using Blocks = std::map<uint32_t, Clock>;  // by block number, what is known of its agents

struct Mark {  // what atomics on one address have passed on
  Blocks blocks;
  uint32_t block = 0;  // the block `clock` belongs to
  Clock clock;
};

struct Acquired {  // by a thread of the running block, at a time of its own
  int thread;
  uint32_t time;
  Blocks blocks;
};

std::unordered_map<uintptr_t, Mark> marks;
std::vector<Acquired> acquired;
uint32_t fenced_until[2][kMaxThreads];  // by Scope: the time up to which a thread's work is fenced; 0: none

bool known(const Acquired& a) { return ordered(current, a.thread, a.time); }

void join(Blocks& into, const Blocks& from) {
  for (const auto& [block, clock] : from) {
    Clock& known = into[block];
    if (known.size() < clock.size()) known.resize(clock.size());
    for (size_t i = 0; i < clock.size(); i++) known[i] = std::max(known[i], clock[i]);
  }
}

}  // namespace

void reset_launch_order() { marks.clear(); }

void reset_order() {
  acquired.clear();
  for (auto& times : fenced_until) std::fill(times, times + threads, 0);
}

void fence(Scope scope) {
  if (current < 0) return;
  const uint32_t time = advance(current);
  fenced_until[BLOCK][current] = time;
  if (scope == DEVICE) fenced_until[DEVICE][current] = time;
}

void order_atomic(uintptr_t address) {
  const uint32_t in_block = fenced_until[BLOCK][current], in_grid = fenced_until[DEVICE][current];
  auto found = marks.find(address);
  if (found == marks.end()) {
    if (!in_block) return;
    found = marks.emplace(address, Mark()).first;
  }
  Mark& mark = found->second;
  if (mark.block == block_number) acquire(current, mark.clock);
  if (!mark.blocks.empty()) acquired.push_back({current, clocks.time[current], mark.blocks});

  if (in_block) {
    if (mark.block != block_number) mark.clock.clear();
    mark.block = block_number;
    tell(current, in_block, mark.clock);
  }
  if (in_grid) {
    tell(current, in_grid, mark.blocks[block_number]);
    for (const Acquired& a : acquired)
      if (known(a)) join(mark.blocks, a.blocks);
  }
}

bool ordered_between_blocks(uint32_t block, int agent, uint32_t time) {
  for (const Acquired& a : acquired) {
    const auto it = a.blocks.find(block);
    if (it != a.blocks.end() && time <= it->second[agent] && known(a)) return true;
  }
  return false;
}

}  // namespace simt

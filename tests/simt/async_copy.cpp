// cp.async: the bytes are in flight from issue to the issuing thread's wait. They land at the last legal moment, or at
// a random one, and whatever looks at them before the wait is wrong either way.
#include <algorithm>
#include <cstring>
#include <vector>

#include "engine.h"

namespace simt {

namespace {

struct Copy {
  char* dst;
  const char* src;
  unsigned bytes, src_bytes;
  bool landed;
};
using Group = std::vector<Copy>;

struct Queue {
  Group open;                    // since the last commit
  std::vector<Group> committed;  // oldest first
};
Queue queues[kMaxThreads];

void land(Copy& c) {
  if (c.landed) return;
  memcpy(c.dst, c.src, c.src_bytes);
  memset(c.dst + c.src_bytes, 0, c.bytes - c.src_bytes);
  c.landed = true;
}

// Seen from other threads, the write happens when the wait ends.
void finish(Copy& c) {
  land(c);
  if (Cell* cells = shared_cells(c.dst, c.bytes))
    for (unsigned i = 0; i < c.bytes; i++) {
      cells[i].state = kValid | kGeneric;
      cells[i].write_time = clocks.time[current];
    }
}

void reset() {
  for (int t = 0; t < threads; t++) {
    queues[t].open.clear();
    queues[t].committed.clear();
  }
}

void exited(int thread) {
  const Queue& q = queues[thread];
  const auto empty = [](const Group& g) { return g.empty(); };
  if (!q.open.empty() || !std::all_of(q.committed.begin(), q.committed.end(), empty))
    fail("in flight: the thread returns before its cp.async has landed (cp.async.wait_group is missing)");
}

const Part part({.reset = reset, .exited = exited});

}  // namespace

void cp_async(uint32_t dst, const void* src, unsigned bytes, unsigned src_bytes) {
  const void* pc = __builtin_return_address(0);
  Copy c{nullptr, static_cast<const char*>(src), bytes, std::min(bytes, src_bytes), false};
  if (bytes != 4 && bytes != 8 && bytes != 16)
    fail("cp.async copies 4, 8 or 16 bytes, not %u%s", bytes, where(pc).c_str());
  if (reinterpret_cast<uintptr_t>(src) % bytes)
    fail("misaligned: cp.async reads %p, which is not a multiple of %u%s", src, bytes, where(pc).c_str());
  if (dst % bytes)
    fail("misaligned: cp.async writes shared address %#x, which is not a multiple of %u%s", dst, bytes,
         where(pc).c_str());
  c.dst = smem_ptr(dst, bytes);
  if (c.src_bytes) access_at(src, c.src_bytes, READ, pc);
  access_at(c.dst, bytes, WRITE, pc);
  if (Cell* cells = shared_cells(c.dst, bytes))
    for (unsigned i = 0; i < bytes; i++) cells[i].state |= kInFlight;
  if (!config.lazy_async && random32() & 1) land(c);
  queues[current].open.push_back(c);
}

void cp_commit() {
  Queue& q = queues[current];
  q.committed.push_back(std::move(q.open));
  q.open.clear();
}

void cp_wait(unsigned pending_groups) {
  auto& committed = queues[current].committed;
  if (committed.size() <= pending_groups) return;
  const auto end = committed.end() - pending_groups;
  for (auto group = committed.begin(); group != end; ++group)
    for (Copy& c : *group) finish(c);
  committed.erase(committed.begin(), end);
}

}  // namespace simt

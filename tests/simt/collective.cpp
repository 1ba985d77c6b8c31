// Warp collectives and block barriers. Whoever arrives last does the work for all and wakes them; who waits for lanes
// that never come shows in the deadlock picture.
#include <algorithm>
#include <cstring>

#include "scheduler.h"

namespace simt {

int returned;

namespace {

constexpr int kBarriers = 16;  // 0 is __syncthreads
int arrived[kBarriers];
int expected[kBarriers];                   // threads the waiting ones asked for; 0: the whole block
uint32_t lanes_waiting[kMaxThreads / 32];  // in a collective, by warp

bool same_text(const char* a, const char* b) { return a == b || !strcmp(a, b); }

bool agree(const Fiber& a, const Fiber& b) {
  return a.mask == b.mask && same_text(a.op, b.op) &&
         (!b.aligned || (a.site.line == b.site.line && same_text(a.site.file, b.site.file)));
}

void try_release(int id) {
  if (!arrived[id] || arrived[id] < (expected[id] ? expected[id] : threads - returned)) return;
  static int who[kMaxThreads];
  int here = 0;
  for (int t = 0; t < threads; t++)
    if (fibers[t].state == State::in_barrier && fibers[t].barrier == id) who[here++] = t;
  arrived[id] = 0;
  const Site site = fibers[who[0]].site;
  if (returned && !expected[id] && !config.early_exit_ok)
    fail("%s at %s:%d after %d threads of the block have returned", fibers[who[0]].op, site.file, site.line, returned);
  for (int k = 0; k < here; k++) {
    const Fiber &f = fibers[who[k]], &first = fibers[who[k] & ~31];
    if (first.state == State::in_barrier && first.barrier == id &&
        !(f.site.line == first.site.line && same_text(f.site.file, first.site.file)))
      fail("lanes of warp %d meet at different barriers, %s:%d and %s:%d", who[k] / 32, first.site.file,
           first.site.line, f.site.file, f.site.line);
  }
  stats.barriers++;
  if (here == (expected[id] ? threads : threads - returned))  // what has returned takes no part in a counted barrier
    meet_all();
  else
    meet(who, here);
  if (config.order == RANDOM) shuffle(who, here);
  if (config.order == ASCENDING) std::reverse(who, who + here);  // the last woken runs first
  for (int k = 0; k < here; k++) wake(who[k]);
}

}  // namespace

void reset_collectives() {
  returned = 0;
  std::fill(arrived, arrived + kBarriers, 0);
  std::fill(lanes_waiting, lanes_waiting + kMaxThreads / 32, 0);
}

void collective(const char* op, uint32_t mask, bool aligned, void* arg, Exec exec, Site site) {
  if (current < 0) fail("%s at %s:%d", op, site.file, site.line);
  Fiber& f = fibers[current];
  const int first = current & ~31;
  const uint32_t mine = 1u << (current & 31), all = warp_mask();
  stats.collectives++;
  if (mask == ~0u) mask = all;
  if (!(mask & mine)) fail("%s at %s:%d: the calling lane is not in its own mask %08x", op, site.file, site.line, mask);
  if (mask & ~all)
    fail("%s at %s:%d: mask %08x names lanes that the block does not have", op, site.file, site.line, mask);
  f.state = State::in_collective;
  f.op = op;
  f.site = site;
  f.mask = mask;
  f.aligned = aligned;
  f.arg = arg;
  uint32_t& waiting = lanes_waiting[first / 32];
  waiting |= mine;
  if (mask & ~waiting) {
    leave();
    return;
  }
  void* args[32] = {};
  for (int i = 0; i < 32; i++) {
    if (!(mask >> i & 1)) continue;
    const Fiber& other = fibers[first + i];
    if (!agree(other, f)) {
      leave();  // all are here, but not for the same: whether others still arrive decides
      return;
    }
    args[i] = other.arg;
  }
  exec(args, mask);
  waiting &= ~mask;
  wake_lanes(first, mask);
  leave();
}

void sync_lanes(uint32_t mask) {
  int who[32], count = 0;
  for (int i = 0; i < 32; i++)
    if (mask >> i & 1) who[count++] = (current & ~31) + i;
  meet(who, count);
}

void barrier(Site site, int id, int count) {
  const char* op = id || count ? "bar.sync" : "__syncthreads";
  if (current < 0) fail("%s at %s:%d", op, site.file, site.line);
  if (id < 0 || id >= kBarriers || count < 0 || count % 32 || count > (threads + 31) / 32 * 32)
    fail("bar.sync %d, %d at %s:%d: ids are 0 to 15, counts multiples of 32 up to the block's %d threads", id, count,
         site.file, site.line, threads);
  Fiber& f = fibers[current];
  f.state = State::in_barrier;
  f.op = op;
  f.site = site;
  f.barrier = id;
  f.mask = 0;
  if (arrived[id] && expected[id] != count)
    fail("bar.sync %d at %s:%d expects %d threads, those who wait there expect %d", id, site.file, site.line, count,
         expected[id]);
  expected[id] = count;
  arrived[id]++;
  try_release(id);
  leave();
}

void thread_returned() {
  returned++;
  if (config.early_exit_ok) try_release(0);
}

}  // namespace simt

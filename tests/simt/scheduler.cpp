// One block at a time: its threads are fibers, and a thread runs until it waits, yields or returns.
#include "scheduler.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <vector>

#include "memory.h"
#include "order.h"

namespace simt {

Config config;
Stats stats;
Fiber fibers[kMaxThreads];
int current = -1, threads = 0;
uint32_t block_number, launch_begin;
uint3 thread_index, block_index;
dim3 block_dim, grid_dim;
Kernel kernel;

namespace {

Context scheduler;
std::deque<int> ready;  // BREADTH runs the front, the others the back
uint64_t random_state, steps;
std::string message;

struct Abandoned {};  // thrown by fail() on the scheduler's own stack

std::vector<Part::Hooks>& parts() {
  static std::vector<Part::Hooks> all;
  return all;
}

void thread_main() {
  kernel.body(kernel.args);
  fibers[current].state = State::done;
  for (const auto& part : parts())
    if (part.exited) part.exited(current);
  thread_returned();
  leave();
}

int pick() {
  int t;
  if (config.order == BREADTH) {
    t = ready.front();
    ready.pop_front();
  } else {
    if (config.order == RANDOM) std::swap(ready[random32() % ready.size()], ready.back());
    t = ready.back();
    ready.pop_back();
  }
  return t;
}

// Per warp, which lanes wait where; neighbouring warps with the same picture are told once.
std::string picture(int first_thread) {
  std::string text;
  char line[512];
  const int lanes = std::min(32, threads - first_thread);
  uint32_t told = 0;
  for (int i = 0; i < lanes; i++) {
    if (told >> i & 1) continue;
    const Fiber& f = fibers[first_thread + i];
    uint32_t same = 0;
    for (int j = i; j < lanes; j++) {
      const Fiber& g = fibers[first_thread + j];
      if (g.state != f.state) continue;
      if (f.state == State::done ||
          (g.site.line == f.site.line && g.mask == f.mask && std::string(g.op) == f.op && g.site.file == f.site.file))
        same |= 1u << j;
    }
    told |= same;
    const bool partial = f.state == State::in_collective && f.mask != warp_mask_of(first_thread);
    if (f.state == State::done)
      snprintf(line, sizeof line, "\n      lanes %08x have returned", same);
    else if (partial)
      snprintf(line, sizeof line, "\n      lanes %08x wait in %s for lanes %08x at %s:%d", same, f.op, f.mask,
               f.site.file, f.site.line);
    else
      snprintf(line, sizeof line, "\n      lanes %08x wait in %s at %s:%d", same, f.op, f.site.file, f.site.line);
    text += line;
  }
  return text;
}

std::string deadlock() {
  std::string text = who() + ": deadlock, no lane can go on:";
  const int warps = (threads + 31) / 32;
  for (int w = 0, end; w < warps; w = end) {
    const std::string lanes = picture(32 * w);
    for (end = w + 1; end < warps && picture(32 * end) == lanes;) end++;
    text += end - w == 1 ? "\n    warp " + std::to_string(w) + ":"
                         : "\n    warps " + std::to_string(w) + " to " + std::to_string(end - 1) + ":";
    text += lanes;
  }
  return text;
}

// Lets the parts do one pending step; false: none of them had one.
bool progress() {
  bool moved = false;
  try {
    for (const auto& part : parts())
      if (part.progress) moved |= part.progress();
  } catch (const Abandoned&) {
  }
  return moved;
}

}  // namespace

Part::Part(const Hooks& hooks) { parts().push_back(hooks); }

uint32_t random32() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return static_cast<uint32_t>(random_state >> 32);
}

void shuffle(int* items, int count) {
  for (int i = count - 1; i > 0; i--) std::swap(items[i], items[random32() % (i + 1)]);
}

void seed_schedule() {
  random_state = config.seed * 0x9E3779B97F4A7C15ull + 1;
  steps = 0;
  message.clear();
}

void set_failure(std::string text) { message = std::move(text); }
const std::string& failure() { return message; }

std::string who() {
  char text[160];
  const int n = snprintf(text, sizeof text, "block (%u,%u,%u)", block_index.x, block_index.y, block_index.z);
  if (current >= 0)
    snprintf(text + n, sizeof text - n, " thread %d (warp %d lane %d)", current, current / 32, current % 32);
  return text;
}

std::string agent_name(int agent) {
  return agent < threads ? "thread " + std::to_string(agent) : "asynchronous engine " + std::to_string(agent - threads);
}

void fail(const char* format, ...) {
  char text[4096];
  va_list list;
  va_start(list, format);
  vsnprintf(text, sizeof text, format, list);
  va_end(list);
  std::string place;
  if (current >= 0 && fibers[current].state == State::in_collective) {  // the last lane, at work for all
    const Fiber& f = fibers[current];
    place = std::string(" in ") + f.op + " at " + f.site.file + ":" + std::to_string(f.site.line);
  }
  const bool launched = kernel.body;
  if (launched) set_failure(who() + ": " + text + place);
  if (current >= 0) {
    leave();  // for good: the fiber is abandoned, and device code owns nothing
    abort();
  }
  if (launched) throw Abandoned();
  fprintf(stderr, "simt: outside a kernel: %s\n", text);
  abort();
}

void leave() { switch_to(fibers[current].context, scheduler); }

void park(const char* op, Site site) {
  Fiber& f = fibers[current];
  f.state = State::parked;
  f.op = op;
  f.site = site;
  f.mask = 0;
  leave();
}

void wake(int thread) {
  fibers[thread].state = State::ready;
  ready.push_back(thread);
}

void wake_lanes(int first_thread, uint32_t mask) {
  int order[32], count = 0;
  for (int i = 0; i < 32; i++)
    if (mask >> i & 1) order[count++] = first_thread + i;
  if (config.order == RANDOM) shuffle(order, count);
  if (config.order == ASCENDING) std::reverse(order, order + count);  // the last woken runs first
  for (int i = 0; i < count; i++) wake(order[i]);
}

void yield() {
  if (current < 0) return;
  if (++steps > config.max_steps)
    fail("gave way %llu times in this launch: a wait that never ends?",
         static_cast<unsigned long long>(config.max_steps));
  if (config.order == BREADTH)
    ready.push_back(current);
  else
    ready.push_front(current);
  leave();
}

int lane() { return current & 31; }

uint32_t warp_mask_of(int first_thread) {
  const int lanes = std::min(32, threads - first_thread);
  return lanes == 32 ? ~0u : (1u << lanes) - 1;
}
uint32_t warp_mask() { return warp_mask_of(current & ~31); }

void run_block(size_t smem) {
  stats.blocks++;
  reset_clocks(threads);
  reset_memory(smem);
  reset_order();
  reset_collectives();
  for (const auto& part : parts())
    if (part.reset) part.reset();
  ready.clear();
  for (int t = 0; t < threads; t++) prepare(fibers[t].context, t, thread_main);
  static int warps[kMaxThreads / 32];
  const int count = (threads + 31) / 32;
  for (int w = 0; w < count; w++) warps[w] = w;
  if (config.order == RANDOM) shuffle(warps, count);
  if (config.order == ASCENDING) std::reverse(warps, warps + count);
  for (int w = 0; w < count; w++) wake_lanes(32 * warps[w], warp_mask_of(32 * warps[w]));

  while (message.empty()) {
    const bool early = !config.lazy_async && random32() % 64 == 0;
    if ((ready.empty() || early) && !progress() && ready.empty()) break;
    if (ready.empty()) continue;
    current = pick();
    thread_index = {current % block_dim.x, current / block_dim.x % block_dim.y, current / (block_dim.x * block_dim.y)};
    stats.switches++;
    switch_to(scheduler, fibers[current].context);
    current = -1;
  }
  if (message.empty() && std::any_of(fibers, fibers + threads, [](const Fiber& f) { return f.state != State::done; }))
    set_failure(deadlock());
}

}  // namespace simt

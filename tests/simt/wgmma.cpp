// wgmma: a tensor core per warpgroup that reads its operands and delivers its sums at its own pace. What is emulated,
// and what is not, stands in hopper_twin.h.
#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <vector>

#include "engine.h"
#include "hopper.h"
#include "hopper_twin.h"

namespace simt {
namespace {

constexpr int kGroup = 128;  // threads of a warpgroup

// The registers of one accumulator array in all threads of the group, while any wgmma on them is in flight.
struct Accumulator {
  float* registers[kGroup];
  std::vector<float> sums;  // [64][n], as the tensor core holds them
  int in_flight = 0;
};

struct Multiply {
  Accumulator* accumulator;
  uint64_t a, b;
  bool accumulate;
  WgmmaShape shape;
  bool done = false;
};

struct Warpgroup {
  std::map<float*, Accumulator> accumulators;  // by where the first thread keeps them
  std::vector<Multiply> open;                  // issued, not committed
  std::deque<std::vector<Multiply>> groups;    // committed, oldest first
  bool fenced = false;
  int arrived = 0;
};
Warpgroup warpgroups[kLoader];

// What a thread brings to the instruction it waits in.
struct Issue {
  float* sum;
  uint64_t a, b;
};
Issue issues[kMaxThreads];

// No arithmetic makes this NaN, so a register that differs has been written.
constexpr uint32_t kInFlightBits = 0x7fedcba9;

// Sum j of thread t in the fragment: row and column of the 64 x n result.
int fragment_row(int t, int j) { return t / 32 * 16 + t % 32 / 4 + j / 2 % 2 * 8; }
int fragment_column(int t, int j) { return j / 4 * 8 + t % 4 * 2 + j % 2; }

// Where an operand's element lies; `at` counts along M or N. A descriptor has a start and two offsets, in bytes.
// Swizzled and K-major, eight rows of one span make a group: `stride` leads from group to group. Swizzled and
// M/N-major, eight k of one span of M/N make a group: `stride` leads to the next eight k, `leading` to the next span.
// Without swizzle, eight rows (or k) of 16 bytes make a block: `stride` leads to the next block along M/N, `leading`
// along K.
uint32_t operand_address(uint64_t descriptor, int at, int k, bool by_k) {
  const uint32_t start = (descriptor & 0x3fff) << 4;
  const uint32_t leading = (descriptor >> 16 & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  const int mode = descriptor >> 62, span = mode ? 256 >> mode : 0;
  uint32_t offset;
  if (mode == 0) {
    offset = by_k ? at / 8 * stride + at % 8 * 16 + k / 8 * leading + k % 8 * 2
                  : at / 8 * stride + at % 8 * 2 + k / 8 * leading + k % 8 * 16;
  } else {
    const int per_span = span / 2;
    offset = by_k ? at / 8 * stride + at % 8 * span + k * 2
                  : at / per_span * leading + at % per_span * 2 + k / 8 * stride + k % 8 * span;
  }
  return swizzle(start + offset, span);
}

void check_descriptor(uint64_t descriptor, Site site) {
  const int mode = descriptor >> 62;
  const uint32_t start = (descriptor & 0x3fff) << 4;
  if (descriptor >> 49 & 7)
    fail("wgmma at %s:%d: descriptor %#llx has a base offset, which is not emulated: align tiles to their swizzle",
         site.file, site.line, static_cast<unsigned long long>(descriptor));
  if (mode && start >> 7 & ((256 >> mode) / 16 - 1))
    fail("wgmma at %s:%d: operand at shared address %#x is not aligned to the %d-byte period of its swizzle", site.file,
         site.line, start, period(256 >> mode));
}

// Calls visit(address) for every 16-byte chunk that an operand of `extent` rows (or columns) by 16 covers.
template <class Visit>
void each_chunk(uint64_t descriptor, int extent, bool by_k, Visit visit) {
  for (int at = 0; at < extent; at += by_k ? 1 : 8)
    for (int k = 0; k < 16; k += by_k ? 8 : 1) visit(operand_address(descriptor, at, k, by_k));
}

template <class Visit>
void each_chunk(const Multiply& multiply, Visit visit) {
  each_chunk(multiply.a, 64, !multiply.shape.a_by_m, visit);
  each_chunk(multiply.b, multiply.shape.n, !multiply.shape.b_by_n, visit);
}

double element(uint64_t descriptor, int at, int k, bool by_k) {
  uint16_t bits;
  std::memcpy(&bits, smem_ptr(operand_address(descriptor, at, k, by_k), 2), 2);
  return from_bf16(bits);
}

void execute(Multiply& multiply) {
  if (multiply.done) return;
  multiply.done = true;
  static double a[64][16], b[256][16];
  const int n = multiply.shape.n;
  for (int k = 0; k < 16; k++) {
    for (int i = 0; i < 64; i++) a[i][k] = element(multiply.a, i, k, !multiply.shape.a_by_m);
    for (int j = 0; j < n; j++) b[j][k] = element(multiply.b, j, k, !multiply.shape.b_by_n);
  }
  float* sum = multiply.accumulator->sums.data();
  for (int i = 0; i < 64; i++)
    for (int j = 0; j < n; j++, sum++) {
      double total = multiply.accumulate ? *sum : 0;
      for (int k = 0; k < 16; k++) total += a[i][k] * b[j][k];
      *sum = static_cast<float>(total);
    }
}

// Marks the operands as being read, after checking that each warp may: landed, initialised, ordered before, fenced.
void begin_reading(const Multiply& multiply, int first_thread, Site site) {
  each_chunk(multiply, [&](uint32_t address) {
    Cell* const cells = shared_cells(smem_ptr(address, 16), 16);
    for (int i = 0; cells && i < 16; i++) {
      Cell& cell = cells[i];
      cell.reading++;
      const Cell* before = i ? &cells[i - 1] : nullptr;
      if (before && cell.state == before->state && cell.writer == before->writer &&
          cell.write_time == before->write_time)
        continue;
      if (cell.state & kInFlight)
        fail("wgmma at %s:%d reads shared address %#x while a copy is writing it", site.file, site.line, address + i);
      if (!(cell.state & kValid))
        fail("wgmma at %s:%d reads shared address %#x, which nothing has written", site.file, site.line, address + i);
      if (!cell.writer) continue;
      const int writer = cell.writer - 1;
      for (int warp = first_thread; warp < first_thread + kGroup; warp += 32) {
        bool known = false;  // by one lane at least: the instruction is the warp's
        for (int t = warp; t < warp + 32 && !known; t++) known = ordered(t, writer, cell.write_time);
        if (!known)
          fail("race: wgmma at %s:%d (warp %d) reads shared address %#x, not ordered after the write by %s%s",
               site.file, site.line, warp / 32, address + i, agent_name(writer).c_str(),
               where_offset(cell.write_pc).c_str());
      }
      if (cell.state & kGeneric && !fenced(writer, cell.write_time))
        fail("wgmma at %s:%d reads shared address %#x, which thread %d wrote%s without a fence.proxy.async after it",
             site.file, site.line, address + i, writer, where_offset(cell.write_pc).c_str());
    }
  });
}

void end_reading(const Multiply& multiply, int agent) {
  each_chunk(multiply, [&](uint32_t address) {
    Cell* const cells = shared_cells(smem_ptr(address, 16), 16);
    for (int i = 0; cells && i < 16; i++) {
      Cell& cell = cells[i];
      cell.reading--;
      const int slot = cell.reader[0] && cell.reader[0] != 1 + agent;  // keeps a thread's own read on record
      cell.reader[slot] = 1 + agent;
      cell.read_time[slot] = clocks.time[agent];
    }
  });
}

// The 128 threads of the caller's warpgroup meet at one instruction; `act(group, first thread)` runs in the last.
template <class Act>
void rendezvous(const char* op, Site site, Act act) {
  const int first = current / kGroup * kGroup;
  if (first + kGroup > threads || first / kGroup >= kLoader)
    fail("%s at %s:%d by thread %d: a block of %d threads has no full warpgroup there (warpgroups 0 to %d can)", op,
         site.file, site.line, current, threads, kLoader - 1);
  Warpgroup& group = warpgroups[first / kGroup];
  if (++group.arrived < kGroup) {
    park(op, site);
    return;
  }
  group.arrived = 0;
  for (int t = first; t < first + kGroup; t++)
    if (t != current && (std::strcmp(fibers[t].op, op) || fibers[t].site.line != site.line))
      fail("the warpgroup diverges: thread %d is in %s at %s:%d, thread %d in %s at %s:%d", current, op, site.file,
           site.line, t, fibers[t].op, fibers[t].site.file, fibers[t].site.line);
  act(group, first);
  for (int t = first; t < first + kGroup; t++)
    if (t != current) wake(t);
}

void retire(Warpgroup& group, int first, Multiply& multiply) {
  execute(multiply);
  end_reading(multiply, engine(first / kGroup));
  Accumulator& accumulator = *multiply.accumulator;
  if (--accumulator.in_flight) return;
  const int n = multiply.shape.n;
  for (int t = 0; t < kGroup; t++)
    for (int j = 0; j < n / 2; j++) {
      if (bits(accumulator.registers[t][j]) != kInFlightBits)
        fail("thread %d wrote accumulator %d of a wgmma before the wgmma.wait_group for it", first + t, j);
      accumulator.registers[t][j] = accumulator.sums[fragment_row(t, j) * n + fragment_column(t, j)];
    }
  group.accumulators.erase(accumulator.registers[0]);
}

// ---- the part

void reset() {
  for (Warpgroup& group : warpgroups) group = {};
}

// The group's oldest product that has not been computed, or null: they are computed in order.
Multiply* next(Warpgroup& group) {
  for (auto& committed : group.groups)
    for (Multiply& multiply : committed)
      if (!multiply.done) return &multiply;
  for (Multiply& multiply : group.open)
    if (!multiply.done) return &multiply;
  return nullptr;
}

// Late tensor cores multiply at the wait, others at any time.
bool progress() {
  if (config.lazy_async) return false;
  const uint32_t first = random32() % kLoader;
  for (int i = 0; i < kLoader; i++)
    if (Multiply* const multiply = next(warpgroups[(first + i) % kLoader])) {
      execute(*multiply);
      return true;
    }
  return false;
}

void exited(int thread) {
  if (thread / kGroup >= kLoader) return;
  const Warpgroup& group = warpgroups[thread / kGroup];
  if (!group.open.empty() || !group.groups.empty())
    fail("thread %d returns with a wgmma in flight: wgmma.wait_group comes first", thread);
}

const Part part({.reset = reset, .progress = progress, .exited = exited});

}  // namespace

void wgmma_fence(Site site) {
  rendezvous("wgmma.fence", site, [](Warpgroup& group, int) { group.fenced = true; });
}

void wgmma_commit(Site site) {
  rendezvous("wgmma.commit_group", site, [](Warpgroup& group, int) {
    group.groups.push_back(std::move(group.open));
    group.open.clear();
  });
}

void wgmma(float* sum, uint64_t a, uint64_t b, bool accumulate, WgmmaShape shape, Site site) {
  issues[current] = {sum, a, b};
  rendezvous("wgmma.mma_async", site, [&](Warpgroup& group, int first) {
    if (!group.fenced)
      fail("wgmma at %s:%d without a wgmma.fence since the accumulators were last free", site.file, site.line);
    check_descriptor(a, site);
    check_descriptor(b, site);
    for (int t = first; t < first + kGroup; t++)
      if (issues[t].a != a || issues[t].b != b)
        fail("wgmma at %s:%d: threads %d and %d give different descriptors", site.file, site.line, current, t);
    const auto [entry, fresh] = group.accumulators.try_emplace(issues[first].sum);
    Accumulator& accumulator = entry->second;
    if (!fresh && accumulator.sums.size() != 64u * shape.n)
      fail("wgmma at %s:%d: its accumulators are in flight with another N", site.file, site.line);
    if (fresh) {
      accumulator.sums.resize(64 * shape.n);
      for (int t = 0; t < kGroup; t++) {
        float* const registers = accumulator.registers[t] = issues[first + t].sum;
        for (int j = 0; j < shape.n / 2; j++) {
          accumulator.sums[fragment_row(t, j) * shape.n + fragment_column(t, j)] = registers[j];
          registers[j] = real(kInFlightBits);
        }
      }
    }
    accumulator.in_flight++;
    const Multiply multiply{&accumulator, a, b, accumulate, shape};
    begin_reading(multiply, first, site);
    group.open.push_back(multiply);
  });
}

void wgmma_wait(size_t pending, Site site) {
  rendezvous("wgmma.wait_group", site, [&](Warpgroup& group, int first) {
    const int agent = engine(first / kGroup);
    while (group.groups.size() > pending) {
      for (Multiply& multiply : group.groups.front()) retire(group, first, multiply);
      group.groups.pop_front();
    }
    const uint32_t time = advance(agent);
    for (int t = first; t < first + kGroup; t++) learn(t, agent, time);
    if (group.groups.empty()) group.fenced = false;
  });
}

}  // namespace simt

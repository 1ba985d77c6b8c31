// mbarrier, the proxy fence and TMA loads, by an engine that lands them at its own pace. What is emulated, and what is
// not, stands in hopper_twin.h.
#include "hopper.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <vector>

#include "engine.h"
#include "hopper_twin.h"

namespace simt {
namespace {

void note(Clock& message, int agent, uint32_t time) {
  message.resize(std::max<size_t>(message.size(), agent + 1));
  message[agent] = std::max(message[agent], time);
}

// ---- mbarrier

struct Barrier {
  uint32_t arrivals, pending;        // of a phase; still to come in this one
  int64_t bytes = 0;                 // announced and not landed; negative where they landed first
  uint32_t phase = 0;                // phases that have ended
  uint32_t loaded = 0, awaited = 0;  // phases that had to end for the last TMA load; that some thread has waited for
  int initialiser;
  uint32_t init_time;
  Clock gathering, ended;  // what arrivals of this phase released; what those of the last one did
  std::vector<int> waiting;
};
std::map<uint32_t, Barrier> barriers;                        // by address
uint32_t init_fence[kMaxThreads], proxy_fence[kMaxThreads];  // the time each thread's last fence covers

Barrier& find_barrier(uint32_t address, const void* pc) {
  access_at(smem_ptr(address, 8), 8, ATOMIC, pc);
  const auto found = barriers.find(address);
  if (found == barriers.end()) fail("there is no mbarrier at shared address %#x: mbarrier_init comes first", address);
  return found->second;
}

void end_phase_if_complete(Barrier& barrier) {
  if (barrier.pending || barrier.bytes) return;
  barrier.phase++;
  barrier.pending = barrier.arrivals;
  barrier.ended = barrier.gathering;
  for (const int thread : barrier.waiting) wake(thread);
  barrier.waiting.clear();
}

// ---- TMA

struct Load {
  CUtensorMap map;
  uint32_t destination, barrier;
  int column, row;

  uint32_t row_bytes() const { return map.box_columns * map.element_bytes; }
  uint32_t bytes() const { return row_bytes() * map.box_rows; }
};
std::vector<Load> loads;  // in flight, oldest first

void land(const Load& load) {
  const int agent = engine(kLoader), element = load.map.element_bytes;
  Cell* const cells = shared_cells(smem_ptr(load.destination, 1), load.bytes());
  for (int y = 0; y < load.map.box_rows; y++)
    for (int x = 0; x < load.map.box_columns; x++) {
      const uint32_t linear = load.destination + y * load.row_bytes() + x * element;
      char* const target = smem_ptr(swizzle(linear, load.map.swizzle), 1);
      const int64_t row = int64_t{load.row} + y, column = int64_t{load.column} + x;
      if (row >= 0 && row < load.map.rows && column >= 0 && column < load.map.columns)
        std::memcpy(target, load.map.base + row * load.map.row_bytes + column * element, element);
      else
        std::memset(target, 0, element);
    }
  const uint32_t time = advance(agent);
  for (uint32_t i = 0; cells && i < load.bytes(); i++) {
    cells[i].state = kValid;
    cells[i].writer = 1 + agent;
    cells[i].write_time = time;
  }
  Barrier& barrier = barriers.at(load.barrier);
  note(barrier.gathering, agent, time);
  barrier.bytes -= load.bytes();
  end_phase_if_complete(barrier);
}

// ---- the part

int returned;  // threads of the block that have

void reset() {
  returned = 0;
  barriers.clear();
  loads.clear();
  std::fill(std::begin(init_fence), std::end(init_fence), 0);
  std::fill(std::begin(proxy_fence), std::end(proxy_fence), 0);
}

// The oldest load lands when nobody can go on, or any load at any time.
bool progress() {
  if (loads.empty()) return false;
  const size_t pick = config.lazy_async ? 0 : random32() % loads.size();
  const Load load = loads[pick];
  loads.erase(loads.begin() + pick);
  land(load);
  return true;
}

void exited(int) {
  if (++returned < threads) return;
  for (const auto& [address, barrier] : barriers)
    if (barrier.loaded > barrier.awaited)
      fail("the block ends without a wait for the last TMA load on the mbarrier at %#x", address);
}

const Part part({.reset = reset, .progress = progress, .exited = exited});

}  // namespace

CUtensorMap tensor_map_2d(const void* base, int64_t columns, int64_t rows, int64_t row_bytes, int box_columns,
                          int box_rows, int element_bytes, int swizzle) {
  const int64_t box_row_bytes = int64_t{box_columns} * element_bytes;
  const char* refusal = nullptr;
  if (reinterpret_cast<uintptr_t>(base) % 16 || row_bytes % 16)
    refusal = "base and row stride are multiples of 16 bytes";
  if (row_bytes < columns * element_bytes) refusal = "rows do not overlap";
  if (columns < 1 || rows < 1) refusal = "no dimension is empty";
  if (box_columns < 1 || box_columns > 256 || box_rows < 1 || box_rows > 256)
    refusal = "box sides are 1 to 256 elements";
  if (box_row_bytes % 16) refusal = "a box row is a multiple of 16 bytes";
  if (swizzle && box_row_bytes != swizzle) refusal = "a box row is as long as the swizzle span";
  if (swizzle && swizzle != 32 && swizzle != 64 && swizzle != 128) refusal = "the swizzle is 0, 32, 64 or 128 bytes";
  return {
      static_cast<const char*>(base), columns, rows, row_bytes, box_columns, box_rows, element_bytes, swizzle, refusal};
}

void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  if (arrivals < 1 || arrivals >= 1 << 20) fail("mbarrier with %u arrivals: a phase takes 1 to 1048575", arrivals);
  access_at(smem_ptr(barrier, 8), 8, WRITE, __builtin_return_address(0));
  Barrier& created = barriers[barrier] = {};
  created.arrivals = created.pending = arrivals;
  created.initialiser = current;
  created.init_time = clocks.time[current];
}

void fence_mbarrier_init() { init_fence[current] = advance(current); }

void mbarrier_arrive(uint32_t address, uint32_t announced_bytes) {
  Barrier& barrier = find_barrier(address, __builtin_return_address(0));
  if (announced_bytes >= 1 << 20) fail("expect_tx of %u bytes: a phase counts to 1048575", announced_bytes);
  if (!barrier.pending)
    fail("mbarrier at %#x: all %u arrivals of this phase are in already, and it waits for %lld bytes", address,
         barrier.arrivals, static_cast<long long>(barrier.bytes));
  barrier.bytes += announced_bytes;
  barrier.pending--;
  release(current, barrier.gathering);
  end_phase_if_complete(barrier);
}

void mbarrier_wait(uint32_t address, uint32_t parity, Site site) {
  Barrier& barrier = find_barrier(address, __builtin_return_address(0));
  while ((barrier.phase & 1) == parity) {
    barrier.waiting.push_back(current);
    park("mbarrier wait", site);
  }
  barrier.awaited = barrier.phase;
  acquire(current, barrier.ended);
}

void fence_proxy_async() { proxy_fence[current] = advance(current); }

void tma_load_2d(uint32_t destination, const CUtensorMap& map, int column, int row, uint32_t address) {
  const void* const pc = __builtin_return_address(0);
  if (map.refusal) fail("TMA load by a tensor map that breaks a rule: %s", map.refusal);
  Barrier& barrier = find_barrier(address, pc);
  if (init_fence[barrier.initialiser] < barrier.init_time)
    fail("TMA load on the mbarrier at %#x, whose initialisation thread %d did not follow with fence.mbarrier_init",
         address, barrier.initialiser);
  if (destination % period(map.swizzle))
    fail("TMA load to shared address %#x: with a swizzle of %d bytes it must be a multiple of %u", destination,
         map.swizzle, period(map.swizzle));
  barrier.loaded = barrier.phase + 1;
  const Load load{map, destination, address, column, row};
  const int64_t left = std::max<int64_t>(column, 0), right = std::min(column + int64_t{map.box_columns}, map.columns);
  const int64_t top = std::max<int64_t>(row, 0), bottom = std::min(row + int64_t{map.box_rows}, map.rows);
  for (int64_t y = top; y < bottom && left < right; y++)
    access_at(map.base + y * map.row_bytes + left * map.element_bytes, (right - left) * map.element_bytes, READ, pc);
  char* const target = smem_ptr(destination, 16);
  access_at(target, load.bytes(), WRITE, pc);
  Cell* const cells = shared_cells(target, load.bytes());
  for (uint32_t i = 0; cells && i < load.bytes(); i++) cells[i].state = kValid | kInFlight;
  loads.push_back(load);
}

bool fenced(int thread, uint32_t time) { return time <= proxy_fence[thread]; }

}  // namespace simt

#include "shadow.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>

#include "engine.h"
#include "memory.h"
#include "order.h"

namespace simt {

namespace {

// An access by the current thread, as judge() sees it.
struct Access {
  const Region& region;
  size_t n;
  Kind kind;
  const void* pc;

  std::string text(size_t offset) const {
    return std::to_string(n) + "-byte " + verb(kind) + " of " + object(region, offset) + where(pc);
  }
};

[[noreturn]] void race(const Access& access, size_t offset, const char* what, int agent, uint32_t pc) {
  fail("race: %s\n    is not ordered after the %s by %s%s", access.text(offset).c_str(), what,
       agent_name(agent).c_str(), where_offset(pc).c_str());
}

[[noreturn]] void race_between_blocks(const Access& access, size_t offset, const char* what, const Cell& cell) {
  const unsigned n = cell.block - launch_begin;
  const uint32_t pc = access.kind != READ && !cell.writer ? cell.read_pc : cell.write_pc;
  fail("race between blocks: %s\n    is not ordered after the %s by block (%u,%u,%u)%s", access.text(offset).c_str(),
       what, n % grid_dim.x, n / grid_dim.x % grid_dim.y, n / (grid_dim.x * grid_dim.y), where_offset(pc).c_str());
}

// The cell as this block finds it, after judging what other blocks of the launch did to it.
Cell claimed(const Cell& cell, const Access& access, size_t offset) {
  Cell now{};
  now.block = block_number;
  if (access.region.shared) return now;
  now.state = cell.state & kValid;
  if (cell.block < launch_begin) return now;
  const auto unordered = [&](uint16_t agent, uint32_t time) {
    return agent && !ordered_between_blocks(cell.block, agent - 1, time);
  };
  const bool both_atomic = access.kind == ATOMIC && cell.state & kByAtomic;
  if (unordered(cell.writer, cell.write_time) && !both_atomic)
    race_between_blocks(access, offset, cell.state & kByAtomic ? "atomic" : "write", cell);
  for (int i = 0; i < 2; i++)
    if (unordered(cell.reader[i], cell.read_time[i])) {
      if (access.kind != READ) race_between_blocks(access, offset, "read", cell);
      now.state |= kReadElsewhere;
    }
  now.state |= cell.state & kReadElsewhere;
  return now;
}

void check(const Cell& cell, const Access& access, size_t offset) {
  if (cell.state & kInFlight)
    fail("in flight: %s\n    while an asynchronous copy writes it", access.text(offset).c_str());
  if (access.kind != WRITE && !(cell.state & kValid)) fail("uninitialised: %s", access.text(offset).c_str());
  const bool by_atomic = cell.state & kByAtomic;
  if (cell.writer && !ordered(current, cell.writer - 1, cell.write_time) && !(access.kind == ATOMIC && by_atomic))
    race(access, offset, by_atomic ? "atomic" : "write", cell.writer - 1, cell.write_pc);
  if (access.kind == READ) return;
  if (cell.reading) fail("in flight: %s\n    while an asynchronous operation reads it", access.text(offset).c_str());
  for (int i = 0; i < 2; i++)
    if (cell.reader[i] && !ordered(current, cell.reader[i] - 1, cell.read_time[i]))
      race(access, offset, "read", cell.reader[i] - 1, cell.read_pc);
  if (cell.state & kReadElsewhere)
    fail("race between blocks: %s\n    is not ordered after a read by another block", access.text(offset).c_str());
}

// Most of the time of a launch is spent here.
__attribute__((always_inline)) inline bool equal(const Cell& a, const Cell& b) {
  uint64_t x[4], y[4];
  memcpy(x, &a, sizeof x);
  memcpy(y, &b, sizeof y);
  return !((x[0] ^ y[0]) | (x[1] ^ y[1]) | (x[2] ^ y[2]) | (x[3] ^ y[3]));
}

void record_read(Cell& cell, uint32_t pc) {
  const uint16_t me = static_cast<uint16_t>(current + 1);
  const uint32_t now = clocks.time[current];
  const auto free = [&](int i) {  // nobody's, mine, or implied by mine
    return !cell.reader[i] || cell.reader[i] == me || ordered(current, cell.reader[i] - 1, cell.read_time[i]);
  };
  const auto warp = [&](int i) { return (cell.reader[i] - 1) / 32; };
  // Two unordered readers are kept, of different warps where possible: what orders one warp may miss the other.
  const int i = free(0) ? 0 : free(1) ? 1 : warp(0) == warp(1) && warp(0) != current / 32 ? 1 : -1;
  if (i < 0) return;
  cell.reader[i] = me;
  cell.read_time[i] = now;
  cell.read_pc = pc;
}

void record_write(Cell& cell, Kind kind, uint32_t pc) {
  const uint16_t me = static_cast<uint16_t>(current + 1);
  // A thread's own plain write stays the one that others must be ordered after, atomics of its own or not.
  if (kind == ATOMIC && cell.writer == me && !(cell.state & kByAtomic)) return;
  cell.writer = me;
  cell.write_time = clocks.time[current];
  cell.write_pc = pc;
  cell.state = kValid | kGeneric | (kind == ATOMIC ? kByAtomic : 0);
  cell.reader[0] = cell.reader[1] = 0;
}

}  // namespace

Cell* allocate_cells(size_t count) {
  if (!count) return nullptr;
  void* p =
      mmap(nullptr, count * sizeof(Cell), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) abort();
  return static_cast<Cell*>(p);
}

void free_cells(Cell* cells, size_t count) { munmap(cells, count * sizeof(Cell)); }

void judge(Region& region, size_t offset, size_t n, Kind kind, const void* pc) {
  const Access access{region, n, kind, pc};
  const uint32_t module_pc = module_offset(pc);
  Cell* const cells = region.cells + offset;
  for (size_t i = 0, end; i < n; i = end) {
    for (end = i + 1; end < n && equal(cells[i], cells[end]);) end++;  // equal cells fare alike
    Cell cell = cells[i].block == block_number ? cells[i] : claimed(cells[i], access, offset + i);
    check(cell, access, offset + i);
    if (kind == READ)
      record_read(cell, module_pc);
    else
      record_write(cell, kind, module_pc);
    if (equal(cell, cells[i])) continue;
    for (size_t k = i; k < end; k++) cells[k] = cell;
  }
}

const char* verb(Kind kind) { return kind == READ ? "read" : kind == WRITE ? "write" : "atomic"; }

std::string object(const Region& region, size_t offset) {
  if (region.shared && region.begin == module().shared_begin)
    if (const SharedVariable* v = module().variable(offset))
      return "__shared__ " + v->name + "+" + std::to_string(offset - v->offset);
  return region.name + "+" + std::to_string(offset);
}

}  // namespace simt

// Shadow memory: what has happened to each byte that a kernel may write.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "runtime.h"

namespace simt {

enum : uint8_t {
  kValid = 1,          // written, or initialised by the host
  kInFlight = 2,       // an asynchronous copy is writing it
  kByAtomic = 4,       // the last write was an atomic
  kGeneric = 8,        // last written by a thread's own store or cp.async, not by the async proxy
  kReadElsewhere = 16  // global memory: a block that nothing orders before this one has read it
};

// One per byte. Times belong to the clocks of `block`: in shared memory a cell of another block is empty, in global
// memory one of an earlier launch keeps only kValid.
struct Cell {
  uint32_t block;  // number of the block that touched it last, over all launches; 0: none
  uint32_t write_time, write_pc;
  uint32_t read_time[2], read_pc;  // program counters relative to the module
  uint16_t writer, reader[2];      // 1 + agent; 0: nobody
  uint8_t state;
  uint8_t reading;  // asynchronous reads in flight
};
static_assert(sizeof(Cell) == 32);

// A range of bytes with cells (none for read-only buffers).
struct Region {
  uintptr_t begin = 0;
  size_t bytes = 0;
  std::string name;
  Cell* cells = nullptr;
  bool shared = false;

  bool holds(uintptr_t a) const { return a - begin < bytes; }
};

Cell* allocate_cells(size_t count);  // zeroed, on pages that cost nothing until touched
void free_cells(Cell* cells, size_t count);

// Judges an access by the current thread to bytes [offset, offset + n) of the region, and records it.
void judge(Region& region, size_t offset, size_t n, Kind kind, const void* pc);

// Cells of shared memory as of this block. Fails where [p, p + n) is not inside; null where config.shadow is off.
Cell* shared_cells(const void* p, size_t n);

const char* verb(Kind kind);
std::string object(const Region& region, size_t offset);  // "dynamic shared memory+16", "__shared__ float tile[32]+4"

}  // namespace simt

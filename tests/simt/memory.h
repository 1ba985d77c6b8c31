// What an address is: shared memory, a registered buffer, the library's own data, or nothing a kernel may touch.
#pragma once

#include <string>
#include <vector>

#include "shadow.h"

namespace simt {

constexpr size_t kMaxSharedBytes = 232448;  // 227 KiB, what sm_90 grants a block

void prepare_memory();                    // a launch starts: finds this OS thread's copy of the static shared memory
void reset_memory(size_t smem);           // a block starts: shared memory is poisoned
std::string overlapping_buffers();        // "x and y" where one may be written through the other's name; else empty
bool near_dynamic_shared(const void* p);  // inside, or in the guard pages around it

struct SharedVariable {  // a static __shared__ variable
  size_t offset, bytes;
  std::string name;
  bool guard;  // g++'s own: it guards arrays of class type, bf16 among them, for a constructor that does nothing
};

// The shared library this code is part of (symbols.cpp).
struct Module {
  uintptr_t base = 0;
  std::string path;
  std::vector<std::pair<uintptr_t, uintptr_t>> data;  // loaded segments
  uintptr_t shared_begin = 0;                         // its thread-local segment on the launching OS thread
  size_t shared_bytes = 0;
  std::vector<SharedVariable> variables;  // by offset

  const SharedVariable* variable(size_t offset) const;  // the one that holds this byte; null: none
};
Module& module();
void locate_module();  // fills it in; after the first time only shared_begin, which differs by OS thread

}  // namespace simt

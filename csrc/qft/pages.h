// Memory in pages of 2 MiB. A product of one row reads a weight once from end to end: of small pages it walks thousands
// of table entries, which what ran before has pushed out of the caches.
#pragma once

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace qft {

constexpr uintptr_t kHugePage = 2 << 20;

// Asks for huge pages where a range holds whole ones and has not been written yet; elsewhere, and where the system
// keeps none, nothing changes.
static inline void ask_for_huge_pages(uintptr_t address, uintptr_t bytes) {
#ifdef __linux__
  const uintptr_t first = (address + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (address + bytes) / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)address, (void)bytes;
#endif
}

}  // namespace qft

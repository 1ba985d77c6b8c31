// What kernel-side code may ask of the emulator: collectives, checked accesses, shared-memory addresses, async copies.
// Twins of PTX instructions are written with this header alone.
#pragma once

#include <cstddef>
#include <cstdint>

// For functions that handle other lanes' memory or the emulator's own: the sanitizer hooks must not see their accesses.
// g++ does not inline such a function into one without the attribute.
#define SIMT_NOSAN __attribute__((no_sanitize("thread", "undefined")))

// Last parameter of everything a report may have to point at. A return address would not do: g++ duplicates calls.
#define SIMT_SITE simt::Site site = {__builtin_FILE(), __builtin_LINE()}

namespace simt {

struct Site {
  const char* file;
  int line;
};

enum Kind { READ, WRITE, ATOMIC };

// Runs in the last lane that arrives, for the whole warp: lane_args[i] is lane i's `arg` where bit i of mask is set.
using Exec = void (*)(void** lane_args, uint32_t mask);

// Returns once every lane of `mask` has called it with the same op and mask (and at the same site, if `aligned`).
// Orders no memory accesses; an Exec that should calls sync_lanes.
void collective(const char* op, uint32_t mask, bool aligned, void* arg, Exec exec, Site site);
void sync_lanes(uint32_t mask);

// __syncthreads for id 0 and threads 0; otherwise bar.sync id, threads (a multiple of 32).
void barrier(Site site, int id = 0, int threads = 0);

// Bounds, initialisation and races of n bytes at p: for accesses the compiler's hooks do not see, and for atomics.
void access(const void* p, size_t n, Kind kind);

// Ends the launch with a message that names block and thread.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

void yield();  // lets every other lane go first: what a spin-wait must call
enum Scope { BLOCK, DEVICE };
void fence(Scope scope);  // __threadfence_block, __threadfence

int lane();            // of the calling thread in its warp
uint32_t warp_mask();  // the lanes its warp has: less than 32 in the last warp of an odd-sized block

// Dynamic shared memory, at an odd multiple of `align`: no kernel is granted more alignment than it states.
char* dyn_smem(size_t align);
// Shared memory as the hardware addresses it, in 32 bits; the pointer that such an address stands for.
uint32_t smem_u32(const void* p);
char* smem_ptr(uint32_t address, size_t align);

// cp.async of 4, 8 or 16 bytes; those past src_bytes become 0. It is in flight from here to the wait of this thread.
void cp_async(uint32_t dst, const void* src, unsigned bytes, unsigned src_bytes);
void cp_commit();
void cp_wait(unsigned pending_groups);

}  // namespace simt

// The plain C interface between gpu_probe.py and the kernels. gpu_probe.py reads the structs below from this very file:
// a field is int32_t, int64_t, uint16_t [n], const void* or void*. All pointers are the device's.
#pragma once
#include <cstdint>

constexpr int THREADS = 1024;  // of a block in the rate and decode loops; one such block a multiprocessor

struct Work {        // what one kernel does
  int32_t threads;   // per block
  int32_t per_turn;  // rate/*: instructions (pair_*: lookups) per thread and turn; decode/*: units per thread and turn
  int32_t unit_bytes;  // decode/*: packed bytes that a thread takes at once
  int32_t unit_codes;  // decode/*: codes in them; dequantize: codes per block
};

struct Rate {
  int32_t turns;  // loop turns of every thread
  void* cycles;   // [blocks] int64, written: clock ticks of each block's loop
  void* sink;     // [blocks, THREADS] uint32, written so that no result is dead
};

struct Decode {
  const void* packed;    // [mask + 1, unit_bytes]
  void* decoded;         // check/*: [mask + 1, unit_codes] bf16, written
  void* cycles;          // [blocks] int64, written
  void* sink;            // decode/*: [blocks, THREADS] float, written
  uint16_t levels[16];   // bf16 bits of the codebook
  int32_t turns;         //
  int32_t block_stride;  // units between the first units of two blocks: 0 = all blocks read the same ones
  int32_t step;          // units between two reads of one thread
  int32_t mask;          // units - 1, where units is a power of two: reads wrap around
};

struct Linear {
  const void* source;  // [bytes], 16-byte aligned
  void* target;        // linear/write: [bytes]; linear/read: 4 bytes
  int64_t bytes;       // a multiple of 16
};

struct Rows {          // one block per 16 rows
  const void* packed;  // [16 * blocks, row_bytes]
  void* sink;          // 4 bytes
  int32_t row_bytes;   // a multiple of 512
};

struct Dequantize {     // NF4, groups of 64
  const void* packed;   // [codes / 2] uint8, first code in the low nibble
  const void* scales;   // [codes / 64] float
  void* dense;          // [codes] bf16, written: level * scale, rounded once
  int64_t codes;        // a multiple of 64
  uint16_t levels[16];  // bf16 bits of the codebook
};

// Each returns NULL, or what is wrong, in words. `args` is the struct named like the first word of `kernel`; check/*
// and decode/* both take Decode.
extern "C" {
const char* probe_work(const char* kernel, Work* work);
const char* probe_launch(const char* kernel, const void* args, int32_t blocks, void* stream);
const char* probe_decode_on_host(const char* kernel, const Decode* args);  // for check/*; pointers are the host's
const char* probe_sources();  // never fails: the digest of the sources this library was built from
}

// CUDA's qualifiers. Included after the standard headers; __noinline__ stays undefined: libstdc++ spells
// __attribute__((__noinline__)).
#pragma once

#define __global__
#define __device__
#define __host__
#define __constant__ static const
// Static storage that belongs to a block: one block runs at a time on one OS thread, and the module's whole TLS
// segment is shared memory. Block-scope thread_local is static by itself, and `extern` goes with it.
#define __shared__ thread_local
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __grid_constant__

// Dynamic shared memory: char* name, aligned to `align` and no better. A kernel uses one alignment throughout.
#define DYN_SMEM(name, align) char* const name = simt::dyn_smem(align)

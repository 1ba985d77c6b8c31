// CUDA's words for g++: what a kernel source sees through the shims cuda_runtime.h, cuda_bf16.h and cuda_fp16.h.
#pragma once

#ifdef __CUDACC__
#error "simt.h is the host twin of the CUDA headers: nvcc has its own"
#endif

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "host.h"
#include "qualifiers.h"
#include "runtime.h"
#include "vector_types.h"

// Constant to a kernel, so that g++ keeps them in registers; the scheduler sets them before a thread goes on.
extern const uint3 threadIdx __asm__("simt_threadIdx");
extern const uint3 blockIdx __asm__("simt_blockIdx");
extern const dim3 blockDim __asm__("simt_blockDim");
extern const dim3 gridDim __asm__("simt_gridDim");
constexpr int warpSize = 32;

#include "atomics.h"
#include "float16.h"
#include "intrinsics.h"
#include "warp.h"

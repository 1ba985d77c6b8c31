// Numbers in memory, in fp32, bf16 or fp16, read and written as fp32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "qft/format.h"

namespace qft::QFT_ISA {

__device__ __forceinline__ float to_float(float a) { return a; }
__device__ __forceinline__ float to_float(__nv_bfloat16 a) { return __bfloat162float(a); }
__device__ __forceinline__ float to_float(__half a) { return __half2float(a); }

template <class T>
__device__ __forceinline__ T from_float(float a);  // round to nearest even
template <>
__device__ __forceinline__ float from_float<float>(float a) {
  return a;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float a) {
  return __float2bfloat16_rn(a);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float a) {
  return __float2half_rn(a);
}

__device__ __forceinline__ float read(const void* p, int64_t i, Dtype dtype) {
  if (dtype == Dtype::f32) return static_cast<const float*>(p)[i];
  if (dtype == Dtype::bf16) return to_float(static_cast<const __nv_bfloat16*>(p)[i]);
  return to_float(static_cast<const __half*>(p)[i]);
}
__device__ __forceinline__ void write(void* p, int64_t i, float value, Dtype dtype) {
  if (dtype == Dtype::f32)
    static_cast<float*>(p)[i] = value;
  else if (dtype == Dtype::bf16)
    static_cast<__nv_bfloat16*>(p)[i] = from_float<__nv_bfloat16>(value);
  else
    static_cast<__half*>(p)[i] = from_float<__half>(value);
}

// Calls `run` with a value of the C++ type that `dtype` names.
template <class Run>
void with_type(Dtype dtype, Run run) {
  if (dtype == Dtype::f32)
    run(float());
  else if (dtype == Dtype::bf16)
    run(__nv_bfloat16());
  else
    run(__half());
}

}  // namespace qft::QFT_ISA

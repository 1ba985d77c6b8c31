// Launching a kernel: on the tensor's device, in the caller's stream, checked. Under g++ (the SIMT emulator of the
// tests) the same call runs the kernel on the host.
#pragma once

#include <stdexcept>
#include <string>

#include "qft/launch.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include "host.h"
#include "simt.h"
#endif

namespace qft::QFT_ISA {

constexpr int kWarp = 32;

#ifdef __CUDACC__

static inline void check(cudaError_t status) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string(cudaGetErrorName(status)) + ": " + cudaGetErrorString(status));
}

// Makes a device current while it lives.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_));
    if (before_ != device) check(cudaSetDevice(device));
    changed_ = before_ != device;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

constexpr size_t kSharedWithoutAsking = 48 << 10;  // bytes of dynamic shared memory

template <class... Parameters, class... Arguments>
void launch(const Place& place, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared,
            Arguments... arguments) {
  const OnDevice device(place.device);
  // asked for at every launch: the answer belongs to the device, and a process may use several
  if (shared > kSharedWithoutAsking)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(place.stream);
  check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

static inline int multiprocessors(int device) {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

#else

template <class... Parameters, class... Arguments>
void launch(const Place&, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared,
            Arguments... arguments) {
  if (!simt::launch(kernel, grid, dim3(threads), shared, Parameters(arguments)...))
    throw std::runtime_error(simt::error());
}

static inline int multiprocessors(int) { return simt::config.multiprocessors; }

#endif

}  // namespace qft::QFT_ISA

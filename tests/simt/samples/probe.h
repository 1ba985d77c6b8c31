// What the probes share: register, launch, report.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <initializer_list>

struct Buffer {
  const void* data;
  size_t bytes;
  const char* name;
  simt::Use use;
};
using simt::IN;
using simt::INOUT;
using simt::OUT;

// Null, or the report of the launch. No other memory is registered.
template <class... P, class... A>
const char* probe(std::initializer_list<Buffer> buffers, void (*kernel)(P...), dim3 grid, dim3 block, size_t smem,
                  A... args) {
  simt::clear_buffers();
  for (const Buffer& b : buffers) simt::add_buffer(b.data, b.bytes, b.name, b.use);
  if (!simt::launch(kernel, grid, block, smem, args...)) return simt::error();
  return nullptr;
}

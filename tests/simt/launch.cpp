#include <algorithm>
#include <numeric>

#include "faults.h"
#include "memory.h"
#include "order.h"
#include "scheduler.h"

namespace simt {

namespace {

std::vector<int> block_order;
size_t dynamic_bytes;
uint32_t next_block = 1;  // numbers of blocks, over all launches

std::string refusal(dim3 grid, dim3 block, size_t smem) {
  const uint64_t count = uint64_t{block.x} * block.y * block.z, blocks = uint64_t{grid.x} * grid.y * grid.z;
  const auto number = [](uint64_t n) { return std::to_string(n); };
  if (!count || count > kMaxThreads) return number(count) + " threads a block; a block has 1 to 1024";
  if (block.z > 64) return "block.z = " + number(block.z) + "; at most 64";
  if (!blocks || blocks > 0x7fffffff) return number(blocks) + " blocks; 1 to 2147483647 are emulated";
  if (grid.y > 65535 || grid.z > 65535) return "grid.y or grid.z above 65535: use grid.x";
  if (smem > kMaxSharedBytes)
    return number(smem) + " bytes of dynamic shared memory; a block has " + number(kMaxSharedBytes);
  const std::string pair = overlapping_buffers();
  if (!pair.empty()) return "buffers " + pair + " overlap, and one is written: register the memory once, as INOUT";
  return "";
}

void run_blocks() {
  for (const int i : block_order) {
    const unsigned n = static_cast<unsigned>(i);
    block_index = {n % grid_dim.x, n / grid_dim.x % grid_dim.y, n / (grid_dim.x * grid_dim.y)};
    block_number = launch_begin + n;
    run_block(dynamic_bytes);
    if (!failure().empty()) return;
  }
}

}  // namespace

bool run(dim3 grid, dim3 block, size_t smem, void (*body)(const void*), const void* args) {
  seed_schedule();
  prepare_memory();
  const std::string reason = refusal(grid, block, smem);
  if (!reason.empty()) {
    set_failure("launch refused: " + reason);
    return false;
  }
  grid_dim = grid;
  block_dim = block;
  threads = static_cast<int>(block.x * block.y * block.z);
  dynamic_bytes = smem;
  kernel = {body, args};
  launch_begin = next_block;
  next_block += grid.x * grid.y * grid.z;
  reset_launch_order();
  reserve_stacks(threads);
  block_order.resize(static_cast<size_t>(grid.x) * grid.y * grid.z);
  std::iota(block_order.begin(), block_order.end(), 0);
  if (config.order == RANDOM) shuffle(block_order.data(), static_cast<int>(block_order.size()));
  if (config.order == DESCENDING) std::reverse(block_order.begin(), block_order.end());
  run_guarded(run_blocks);
  kernel = {};
  return failure().empty();
}

const char* error() { return failure().c_str(); }

}  // namespace simt

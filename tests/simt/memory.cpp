#include "memory.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>

#include "order.h"
#include "scheduler.h"

namespace simt {

namespace {

constexpr size_t kPage = 4096, kNoMansLand = 65536;
constexpr size_t kDynamicSpan = (kMaxSharedBytes + 2 * kPage) & ~(kPage - 1);  // room for an odd multiple of a page
// 32-bit shared addresses: dynamic memory first, congruent to its pointers modulo a page; static far behind.
constexpr uint32_t kDynamicBase = kPage, kStaticBase = 0x100000;

struct Buffer {
  Region region;
  Use use;
};

char* dynamic_pages = nullptr;  // kDynamicSpan usable bytes between two stretches of no man's land
Region dynamic_shared, static_shared;
size_t dynamic_align;  // 0: this block has not asked for its dynamic memory yet
std::vector<Buffer> buffers;

uintptr_t address(const void* p) { return reinterpret_cast<uintptr_t>(p); }

// NaN in fp32, fp16 and bf16, -1 in integers.
void poison(const Region& region) { memset(reinterpret_cast<void*>(region.begin), 0xff, region.bytes); }

void map_dynamic_shared() {
  void* p = mmap(nullptr, kDynamicSpan + 2 * kNoMansLand, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) abort();
  dynamic_pages = static_cast<char*>(p) + kNoMansLand;
  if (mprotect(dynamic_pages, kDynamicSpan, PROT_READ | PROT_WRITE)) abort();
  dynamic_shared.name = "dynamic shared memory";
  dynamic_shared.shared = true;
  dynamic_shared.cells = allocate_cells(kMaxSharedBytes);
  static_shared.name = "static shared memory";
  static_shared.shared = true;
}

void maybe_yield() {
  if (config.preempt && random32() % static_cast<uint32_t>(config.preempt) == 0) yield();
}

// Names the buffer that the address most likely should have been in.
[[noreturn]] void no_buffer(uintptr_t a, size_t n, Kind kind, const void* pc) {
  const Region* nearest = nullptr;
  size_t distance = kNoMansLand;
  for (const Buffer& b : buffers) {
    const Region& r = b.region;
    const size_t d = a < r.begin ? r.begin - a : a - (r.begin + r.bytes);
    if (d < distance) {
      distance = d;
      nearest = &r;
    }
  }
  if (!nearest)
    fail("illegal address: %zu-byte %s in no buffer, of %p%s", n, verb(kind), reinterpret_cast<void*>(a),
         where(pc).c_str());
  fail("out of bounds: %zu-byte %s in no buffer, %zu bytes %s %s (%zu bytes)%s", n, verb(kind), distance,
       a < nearest->begin ? "before" : "past the end of", nearest->name.c_str(), nearest->bytes, where(pc).c_str());
}

}  // namespace

void prepare_memory() {
  if (!dynamic_pages) map_dynamic_shared();
  locate_module();
  const Module& m = module();
  if (!static_shared.cells) static_shared.cells = allocate_cells(m.shared_bytes);
  static_shared.begin = m.shared_begin;
  static_shared.bytes = m.shared_bytes;
}

void reset_memory(size_t smem) {
  dynamic_shared.begin = address(dynamic_pages);
  dynamic_shared.bytes = smem;
  dynamic_align = 0;
  poison(static_shared);
}

bool near_dynamic_shared(const void* p) {
  return address(p) - (address(dynamic_pages) - kNoMansLand) < kDynamicSpan + 2 * kNoMansLand;
}

void add_buffer(const void* p, size_t bytes, const char* name, Use use) {
  Buffer b;
  b.region.begin = address(p);
  b.region.bytes = bytes;
  b.region.name = name;
  b.use = use;
  if (use != IN) b.region.cells = allocate_cells(bytes);
  if (use == INOUT)
    for (size_t i = 0; i < bytes; i++) b.region.cells[i].state = kValid;
  buffers.push_back(std::move(b));
}

void clear_buffers() {
  for (const Buffer& b : buffers)
    if (b.region.cells) free_cells(b.region.cells, b.region.bytes);
  buffers.clear();
}

size_t unwritten(const void* output) {
  if (!config.shadow) return 0;
  size_t count = 0;
  for (const Buffer& b : buffers)
    if (b.region.begin == address(output) && b.region.cells)
      for (size_t i = 0; i < b.region.bytes; i++) count += !(b.region.cells[i].state & kValid);
  return count;
}

std::string overlapping_buffers() {
  for (size_t i = 0; i < buffers.size(); i++)
    for (size_t j = 0; j < i; j++) {
      const Region &a = buffers[i].region, &b = buffers[j].region;
      const bool overlap = a.begin < b.begin + b.bytes && b.begin < a.begin + a.bytes && a.bytes && b.bytes;
      if (overlap && (buffers[i].use != IN || buffers[j].use != IN)) return b.name + " and " + a.name;
    }
  return "";
}

void access(const void* p, size_t n, Kind kind) { access_at(p, n, kind, __builtin_return_address(0)); }

void access_at(const void* p, size_t n, Kind kind, const void* pc) {
  if (current < 0) return;
  stats.accesses++;
  const uintptr_t a = address(p);
  if (a - address(stack_of(current)) < kStackBytes) return;

  if (near_dynamic_shared(p)) {
    const Region& r = dynamic_shared;
    if (a < r.begin || a + n > r.begin + r.bytes)
      fail("out of bounds: %zu-byte %s at byte %td of %zu of %s%s", n, verb(kind), static_cast<ptrdiff_t>(a - r.begin),
           r.bytes, r.name.c_str(), where(pc).c_str());
    if (kind == ATOMIC) order_atomic(a);
    if (config.shadow) judge(dynamic_shared, a - r.begin, n, kind, pc);
    maybe_yield();
    return;
  }
  if (static_shared.holds(a)) {
    const size_t offset = a - static_shared.begin;
    const SharedVariable* v = module().variable(offset);
    if (v && v->guard) return;  // the poison says that it has been initialised
    // in a stripped library the segment's own bounds have to do
    if (v ? offset + n > v->offset + v->bytes : !module().variables.empty())
      fail("out of bounds: %zu-byte %s of static shared memory at %s%s", n, verb(kind),
           object(static_shared, offset).c_str(), where(pc).c_str());
    if (kind == ATOMIC) order_atomic(a);
    if (config.shadow) judge(static_shared, offset, n, kind, pc);
    maybe_yield();
    return;
  }
  for (Buffer& b : buffers) {
    if (!b.region.holds(a)) continue;
    const size_t offset = a - b.region.begin;
    if (offset + n > b.region.bytes)
      fail("out of bounds: %zu-byte %s at byte %zu of buffer %s (%zu bytes)%s", n, verb(kind), offset,
           b.region.name.c_str(), b.region.bytes, where(pc).c_str());
    if (b.use == IN && kind != READ)
      fail("%s to input buffer %s%s", verb(kind), object(b.region, offset).c_str(), where(pc).c_str());
    if (kind == ATOMIC) order_atomic(a);
    if (b.use != IN && config.shadow) judge(b.region, offset, n, kind, pc);
    maybe_yield();
    return;
  }
  for (const auto& [begin, end] : module().data)
    if (a - begin < end - begin) return;
  no_buffer(a, n, kind, pc);
}

Cell* shared_cells(const void* p, size_t n) {
  const uintptr_t a = address(p);
  for (Region* r : {&dynamic_shared, &static_shared}) {
    if (!r->holds(a)) continue;
    if (a + n > r->begin + r->bytes) break;
    if (!config.shadow) return nullptr;
    Cell* cells = r->cells + (a - r->begin);
    for (size_t i = 0; i < n; i++)
      if (cells[i].block != block_number) {
        cells[i] = Cell();
        cells[i].block = block_number;
      }
    return cells;
  }
  fail("out of bounds: %zu bytes at %p are not in shared memory", n, p);
}

char* dyn_smem(size_t align) {
  Region& r = dynamic_shared;
  if (!align || align & (align - 1) || align > kPage)
    fail("DYN_SMEM aligned to %zu: powers of two up to %zu are emulated", align, kPage);
  if (!dynamic_align) {
    const uintptr_t end = address(dynamic_pages) + kDynamicSpan;
    r.begin = ((end - r.bytes - align) & ~(2 * align - 1)) + align;
    dynamic_align = align;
    poison(r);
  }
  if (dynamic_align != align)
    fail("DYN_SMEM with two alignments, %zu and %zu: state one throughout the kernel", dynamic_align, align);
  return reinterpret_cast<char*>(r.begin);
}

uint32_t smem_u32(const void* p) {
  const uintptr_t a = address(p);
  if (a - dynamic_shared.begin <= dynamic_shared.bytes)
    return static_cast<uint32_t>(a - address(dynamic_pages)) + kDynamicBase;
  if (static_shared.holds(a)) return static_cast<uint32_t>(a - static_shared.begin) + kStaticBase;
  fail("%p has no shared address: it is not shared memory%s", p, where(__builtin_return_address(0)).c_str());
}

char* smem_ptr(uint32_t address, size_t align) {
  if (address % align)
    fail("misaligned: shared address %#x is not a multiple of %zu%s", address, align,
         where(__builtin_return_address(0)).c_str());
  if (address >= kStaticBase) return reinterpret_cast<char*>(static_shared.begin) + (address - kStaticBase);
  return dynamic_pages + (static_cast<int64_t>(address) - kDynamicBase);
}

}  // namespace simt

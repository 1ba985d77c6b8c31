// The functions that code compiled with -fsanitize=thread,undefined calls. libtsan and libubsan are not linked: these
// are ours, so every load and store of an unmodified kernel source, raw pointers included, reaches the emulator.
#include <cstdint>
#include <cstring>

#include "engine.h"

using simt::access_at;

#define PC __builtin_return_address(0)

// ---- -fsanitize=thread: plain accesses

#define HOOK(name, size, kind) \
  extern "C" void name(void* p) { access_at(p, size, simt::kind, PC); }
#define HOOKS(size)                               \
  HOOK(__tsan_read##size, size, READ)             \
  HOOK(__tsan_write##size, size, WRITE)           \
  HOOK(__tsan_unaligned_read##size, size, READ)   \
  HOOK(__tsan_unaligned_write##size, size, WRITE) \
  HOOK(__tsan_volatile_read##size, size, READ)    \
  HOOK(__tsan_volatile_write##size, size, WRITE)
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)

extern "C" {
void __tsan_read_range(void* p, size_t n) { access_at(p, n, simt::READ, PC); }
void __tsan_write_range(void* p, size_t n) { access_at(p, n, simt::WRITE, PC); }
void __tsan_vptr_update(void** p, void*) { access_at(p, sizeof *p, simt::WRITE, PC); }
void __tsan_vptr_read(void** p) { access_at(p, sizeof *p, simt::READ, PC); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_atomic_thread_fence(int) {}
void __tsan_atomic_signal_fence(int) {}
}

// ---- -fsanitize=thread: the __atomic builtins, which the host code of a library may use (shared_ptr, static locals)

#define ATOMIC_UPDATE(bits, name, operation)                                                         \
  extern "C" uint##bits##_t __tsan_atomic##bits##_##name(uint##bits##_t* p, uint##bits##_t v, int) { \
    access_at(p, sizeof v, simt::ATOMIC, PC);                                                        \
    return operation(p, v, __ATOMIC_SEQ_CST);                                                        \
  }
#define ATOMICS(bits)                                                                                        \
  extern "C" uint##bits##_t __tsan_atomic##bits##_load(const uint##bits##_t* p, int) {                       \
    access_at(p, sizeof *p, simt::ATOMIC, PC);                                                               \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                             \
  }                                                                                                          \
  extern "C" void __tsan_atomic##bits##_store(uint##bits##_t* p, uint##bits##_t v, int) {                    \
    access_at(p, sizeof v, simt::ATOMIC, PC);                                                                \
    __atomic_store_n(p, v, __ATOMIC_SEQ_CST);                                                                \
  }                                                                                                          \
  extern "C" bool __tsan_atomic##bits##_compare_exchange_strong(uint##bits##_t* p, uint##bits##_t* expected, \
                                                                uint##bits##_t v, int, int) {                \
    access_at(p, sizeof v, simt::ATOMIC, PC);                                                                \
    return __atomic_compare_exchange_n(p, expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);           \
  }                                                                                                          \
  extern "C" bool __tsan_atomic##bits##_compare_exchange_weak(uint##bits##_t* p, uint##bits##_t* expected,   \
                                                              uint##bits##_t v, int success, int failure) {  \
    return __tsan_atomic##bits##_compare_exchange_strong(p, expected, v, success, failure);                  \
  }                                                                                                          \
  ATOMIC_UPDATE(bits, exchange, __atomic_exchange_n)                                                         \
  ATOMIC_UPDATE(bits, fetch_add, __atomic_fetch_add)                                                         \
  ATOMIC_UPDATE(bits, fetch_sub, __atomic_fetch_sub)                                                         \
  ATOMIC_UPDATE(bits, fetch_and, __atomic_fetch_and)                                                         \
  ATOMIC_UPDATE(bits, fetch_or, __atomic_fetch_or)                                                           \
  ATOMIC_UPDATE(bits, fetch_xor, __atomic_fetch_xor)
ATOMICS(8)
ATOMICS(16)
ATOMICS(32)
ATOMICS(64)

// ---- library calls that g++ makes of copies it does not expand. build.py renames them in kernel objects.

extern "C" void* simt_memcpy(void* to, const void* from, size_t n) {
  access_at(from, n, simt::READ, PC);
  access_at(to, n, simt::WRITE, PC);
  return memcpy(to, from, n);
}
extern "C" void* simt_memmove(void* to, const void* from, size_t n) {
  access_at(from, n, simt::READ, PC);
  access_at(to, n, simt::WRITE, PC);
  return memmove(to, from, n);
}
extern "C" void* simt_memset(void* to, int value, size_t n) {
  access_at(to, n, simt::WRITE, PC);
  return memset(to, value, n);
}

// ---- -fsanitize=undefined: every record starts with its source location

namespace {

struct Source {
  const char* file;
  uint32_t line, column;
};
struct Type {
  uint16_t kind, info;  // kind 0: integer, info = log2(bits) << 1 | signed
  char name[1];
};
struct Mismatch {
  Source source;
  const Type* type;
  unsigned char log2_alignment, check;
};
struct TwoTypes {
  Source source;
  const Type *first, *second;
};

// An operand is passed in the word itself where it fits.
long long value(const Type* type, uintptr_t word) {
  const int bits = 1 << (type->info >> 1);
  if (type->kind != 0 || bits > 64) return static_cast<long long>(word);
  const int unused = 64 - bits;
  const uint64_t shifted = static_cast<uint64_t>(word) << unused;
  return type->info & 1 ? static_cast<int64_t>(shifted) >> unused : static_cast<int64_t>(shifted >> unused);
}

[[noreturn]] void undefined(const Source* s, const char* what) {
  simt::fail("undefined behaviour: %s at %s:%u:%u", what, s->file, s->line, s->column);
}

}  // namespace

extern "C" {

void __ubsan_handle_type_mismatch_v1(const Mismatch* m, uintptr_t p) {
  const Source& s = m->source;
  const unsigned alignment = 1u << m->log2_alignment;
  if (!p) simt::fail("null pointer to %s at %s:%u:%u", m->type->name, s.file, s.line, s.column);
  if (p % alignment)
    simt::fail("misaligned: %p as %s, which needs a multiple of %u, at %s:%u:%u", reinterpret_cast<void*>(p),
               m->type->name, alignment, s.file, s.line, s.column);
  simt::fail("out of bounds: %s does not fit the object it points to at %s:%u:%u", m->type->name, s.file, s.line,
             s.column);
}
void __ubsan_handle_out_of_bounds(const TwoTypes* t, uintptr_t index) {
  const Source& s = t->source;
  simt::fail("out of bounds: index %lld of %s at %s:%u:%u", value(t->second, index), t->first->name, s.file, s.line,
             s.column);
}
void __ubsan_handle_shift_out_of_bounds(const TwoTypes* t, uintptr_t left, uintptr_t right) {
  const Source& s = t->source;
  simt::fail("undefined behaviour: shift of %lld by %lld in %s at %s:%u:%u", value(t->first, left),
             value(t->second, right), t->first->name, s.file, s.line, s.column);
}

#define UNDEFINED(name, text) \
  void __ubsan_handle_##name(const Source* source) { undefined(source, text); }
UNDEFINED(add_overflow, "signed overflow in +")
UNDEFINED(sub_overflow, "signed overflow in -")
UNDEFINED(mul_overflow, "signed overflow in *")
UNDEFINED(negate_overflow, "signed overflow in negation")
UNDEFINED(divrem_overflow, "division by zero or overflow in division")
UNDEFINED(pointer_overflow, "pointer arithmetic wraps around")
UNDEFINED(load_invalid_value, "a bool or enum that holds neither of its values")
UNDEFINED(builtin_unreachable, "__builtin_unreachable is reached")
UNDEFINED(missing_return, "the end of a function that returns a value is reached")
UNDEFINED(nonnull_arg, "null argument where none is allowed")
UNDEFINED(nonnull_return_v1, "null returned where none is allowed")
UNDEFINED(vla_bound_not_positive, "array of no or negative size")
UNDEFINED(float_cast_overflow, "float out of the integer's range")
UNDEFINED(invalid_builtin, "zero passed to a builtin that does not take it")
}

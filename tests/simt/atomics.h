// Atomics: a thread loses its turn only where it asks to, so a read, a write and a yield after them are atomic.
// They are relaxed, as on the device: between threads they order memory only behind a fence.
#pragma once

#include <type_traits>

#include "qualifiers.h"
#include "runtime.h"

namespace simt {

template <class T>
using Same = std::common_type_t<T>;  // no deduction from this argument: atomicAdd(float*, 1) adds 1.0f

template <class T, class F>
SIMT_NOSAN T modify(T* p, F next) {
  const T old = *p;
  *p = next(old);
  yield();
  return old;
}

}  // namespace simt

// access() is called in the kernel's own code: reports then name the kernel's line.
#define SIMT_ATOMIC(name, expression)                                              \
  template <class T>                                                               \
  __forceinline__ T name(T* p, simt::Same<T> value) {                              \
    simt::access(p, sizeof(T), simt::ATOMIC);                                      \
    return simt::modify(p, [value](T old) SIMT_NOSAN -> T { return expression; }); \
  }
SIMT_ATOMIC(atomicAdd, old + value)
SIMT_ATOMIC(atomicSub, old - value)
SIMT_ATOMIC(atomicMax, old < value ? value : old)
SIMT_ATOMIC(atomicMin, value < old ? value : old)
SIMT_ATOMIC(atomicExch, (static_cast<void>(old), value))
SIMT_ATOMIC(atomicAnd, old& value)
SIMT_ATOMIC(atomicOr, old | value)
SIMT_ATOMIC(atomicXor, old ^ value)
SIMT_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
SIMT_ATOMIC(atomicDec, old == 0 || old > value ? value : old - 1)
#undef SIMT_ATOMIC

template <class T>
__forceinline__ T atomicCAS(T* p, simt::Same<T> compare, simt::Same<T> value) {
  simt::access(p, sizeof(T), simt::ATOMIC);
  return simt::modify(p, [compare, value](T old) SIMT_NOSAN -> T { return old == compare ? value : old; });
}

// CUDA's built-in vector types, with CUDA's alignment.
#pragma once

#define SIMT_VECTOR(T, name, size)                                         \
  struct name##1 { T x; };                                                 \
  struct alignas(2 * size) name##2 { T x, y; };                            \
  struct name##3 { T x, y, z; };                                           \
  struct alignas(4 * size > 16 ? 16 : 4 * size) name##4 { T x, y, z, w; }; \
  constexpr name##1 make_##name##1(T x) { return {x}; }                    \
  constexpr name##2 make_##name##2(T x, T y) { return {x, y}; }            \
  constexpr name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }    \
  constexpr name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

SIMT_VECTOR(signed char, char, 1)
SIMT_VECTOR(unsigned char, uchar, 1)
SIMT_VECTOR(short, short, 2)
SIMT_VECTOR(unsigned short, ushort, 2)
SIMT_VECTOR(int, int, 4)
SIMT_VECTOR(unsigned, uint, 4)
SIMT_VECTOR(float, float, 4)
SIMT_VECTOR(long long, longlong, 8)
SIMT_VECTOR(unsigned long long, ulonglong, 8)
SIMT_VECTOR(double, double, 8)
#undef SIMT_VECTOR

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

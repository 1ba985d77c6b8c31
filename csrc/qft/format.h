// What a packed weight matrix is, in the words of the checkpoint. Plain data: host, device and run-time builds share
// it.
#pragma once

#include <cstdint>

// In front of functions that host and device share.
#ifdef __CUDACC__
#define QFT_HOST_DEVICE __host__ __device__
#else
#define QFT_HOST_DEVICE
#endif

namespace qft {

enum class Dtype : int { f32, f16, bf16 };
enum class Scale : int { f32, f16, bf16, dq };  // dq: 8-bit code of the scale, fp32 absmax per 256 scales
enum class Levels : int { codebook, integer };

constexpr int kBlock = 128;  // codes decoded at a time
constexpr int kSub = 32;     // codes that surely share a scale: every group is a multiple of it
constexpr int kSubs = kBlock / kSub;
constexpr int kDqBlock = 256;  // scales per absmax under double quantization

// One packed matrix W[out][in].
struct Weight {
  const uint8_t* codes;      // [out][row_bytes], little-endian, first code in the lowest bits
  const void* scales;        // [out][groups] in scale_kind; uint8 under dq
  const void* zeros;         // [out][groups] in zero_kind, or null: w = scale * (code - zero)
  const float* absmax;       // [ceil(out * groups / 256)] under dq, else null
  const float* offset;       // [1] under dq, else null
  const float* dynamic_map;  // [256] fp32 value of an 8-bit scale code, under dq, else null
  const float* levels;       // [1 << bits] fp32; read by the kernels that were not compiled for a codebook
  int64_t out, in, row_bytes;
  int64_t group;   // weights per scale along in; the whole row for per-channel scales
  int64_t groups;  // ceil(in / group)
  Scale scale_kind;
  Dtype zero_kind;
};

// Bytes that `codes` codes of one row take, row padding left out. 3-bit codes come as 12 bytes per 32.
constexpr int64_t packed_bytes(int bits, int64_t codes) {
  return bits == 3 ? (codes + 31) / 32 * 12 : (codes * bits + 7) / 8;
}

}  // namespace qft

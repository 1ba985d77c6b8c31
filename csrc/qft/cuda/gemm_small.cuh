// y = x Wt for a few rows of x, on tensor cores, straight from the packed rows of W.
//
// Roles. W is the 16-row operand A of mma.m16n8k16 and eight tokens (rows of x) are its n: one token costs what eight
// do, and no thread multiplies by itself. A block of 8 warps takes 128 outputs; its warps walk K together, chunk by
// chunk, over a ring of stages that cp.async fills with packed bytes and activations. Blocks that share outputs split K
// between them; a second kernel adds their partial sums in a fixed order, so the same inputs give the same bits.
//
// Order of K. Which k a column of A stands for is free as long as B agrees. In a record of 32 codes, lane 4g + c takes
// octet c of the rows g and g + 8: its first four codes go to one mma, the other four to a second. So a lane reads one
// word of codes (at 4 bits) and 16 consecutive bytes of activations, the checkpoint's rows need no repacking, and a
// record, which never crosses a group, is summed before the group's scale multiplies it: in fp32, without rounding the
// scale or the product level * scale to 16 bits.
#pragma once

#include <algorithm>
#include <stdexcept>

#include "qft/cuda/decoder.cuh"

namespace qft::QFT_ISA {

constexpr int kGemmWarps = 8;
constexpr int kGemmThreads = kGemmWarps * kWarp;
constexpr int kGemmOutputs = kGemmWarps * 16;  // of a block
constexpr int kGemmRows = 64;                  // rows of x that one launch takes
constexpr int kGemmBlocksPerSm = 2;            // that registers and shared memory are sized for
constexpr int kSplitCodes = 256;               // splits of K begin at multiples: whole chunks for every kernel

// The arguments of one launch.
struct GemmSmall {
  Weight weight;
  LevelTable levels;
  const void* x;                    // [rows][in]
  void* y;                          // [rows][out]
  float* partials;                  // [splits][rows][out], or null: one split, which writes y
  int rows;                         // 1..64
  int64_t codes_a_split;            // along in, a multiple of kSplitCodes
  bool x_by_16_bytes;               // every eight consecutive activations of a row start at a multiple of 16 bytes
  int records_a_group;              // a group is a whole number of records, or the row
  int chunk_groups, chunk_records;  // how far a chunk advances: so many groups, and so many records into the next
};

// Where a stage of the ring keeps what. Sizes and pitches in bytes.
template <int bits, int tiles, bool zeros, int table_bytes>
struct GemmStage {
  // Long chunks spread the cost of a step over more codes and read whole cache lines of W, while they fit.
  static constexpr int records = bits < 8 && tiles + zeros <= 2 ? 8 : 4;
  static constexpr int codes = records * kRecord;
  static constexpr int tokens = 8 * tiles;

  // Packed rows. The lanes of a warp read, in one instruction, a run of at most 16 bytes (32 at 8 bits, by halves of
  // the warp) in each of 8 rows: an odd multiple of 16 (32) bytes between rows puts the 8 (4) runs in different banks.
  static constexpr int run = bits == 8 ? 32 : 16;
  static constexpr int row_bytes = codes * bits / 8;
  static constexpr int row_pitch = row_bytes | run;

  // Activations. A quarter of a warp reads 64 bytes of each of two tokens: 64 bytes more than a multiple of 128 between
  // tokens put them in different halves of the banks.
  static constexpr int token_bytes = codes * 2;
  static constexpr int token_pitch = token_bytes + 64;

  static constexpr int x_offset = kGemmOutputs * row_pitch;
  static constexpr int bytes = x_offset + tokens * token_pitch;
  // Behind the ring: scales and zero points of two chunks, as number_place says; dynamic_map of double-quantized
  // scales; the decoder's table.
  static constexpr int scales = kGemmOutputs * records;  // of a chunk
  static constexpr int companion_bytes = (zeros ? 2 : 1) * 2 * scales * 4, map_bytes = 256 * 4;

  // As many stages, up to three, as leave room for two blocks on an SM with 227 KiB, and for one where 99 KiB is all.
  static constexpr int most = ((99 << 10) - companion_bytes - map_bytes - table_bytes) / bytes;
  static constexpr int stages = most > 3 ? 3 : most;
  static_assert(stages >= 2);

  static constexpr int scale_offset = stages * bytes;
  static constexpr int zero_offset = scale_offset + 2 * scales * 4;
  static constexpr int map_offset = scale_offset + companion_bytes;
  static constexpr int table_offset = map_offset + map_bytes;
  static constexpr int shared_bytes = table_offset + table_bytes;
};

// Copies a strip of `rows` rows to the ring, chunk by chunk, `chunk_bytes` of each row at a time. A thread takes one
// 16-byte piece of every `step`-th row. What lies outside the matrix becomes 0.
template <int rows, int chunk_bytes, int pitch>
struct StripLoader {
  static constexpr int pieces = chunk_bytes / 16;
  static constexpr int lanes = pieces > 16 ? 32 : pieces > 8 ? 16 : pieces > 4 ? 8 : pieces > 2 ? 4 : pieces;
  static constexpr int step = kGemmThreads / lanes;
  static_assert(chunk_bytes % 16 == 0 && pieces <= 32);

  const char* source;    // this thread's piece of its first row, in the next chunk
  int64_t row_stride;    // bytes between the rows of this thread
  int chunks_inside;     // of them, this thread's piece lies in the matrix
  int rows_left;         // of the matrix, from this thread's first on
  uint32_t destination;  // of the piece, in the first stage: a shared address

  __device__ __forceinline__ static int first_row() { return static_cast<int>(threadIdx.x) / lanes; }
  __device__ __forceinline__ static int piece() { return static_cast<int>(threadIdx.x) % lanes; }
  __device__ __forceinline__ static int place() { return first_row() * pitch + piece() * 16; }
  __device__ __forceinline__ static bool active() {
    return (pieces == lanes || piece() < pieces) && (step <= rows || first_row() < rows);
  }

  __device__ __forceinline__ StripLoader(uint32_t strip, const void* matrix, int64_t stride, int64_t first_byte,
                                         int64_t row_bytes, int64_t matrix_rows) {
    const int64_t byte = first_byte + piece() * 16;
    source = static_cast<const char*>(matrix) + first_row() * stride + byte;
    row_stride = step * stride;
    chunks_inside = static_cast<int>((row_bytes - byte + chunk_bytes - 1) / chunk_bytes);
    rows_left = static_cast<int>(matrix_rows < rows ? matrix_rows : rows) - first_row();
    destination = strip + place();
  }

  // Rows that start at multiples of 16 bytes and are a multiple of 16 bytes long. `stage` in bytes from the first.
  __device__ __forceinline__ void start_copies(int stage, int chunk) const {
    if (!active()) return;
#pragma unroll
    for (int row = 0; row < rows; row += step)
      ptx::cp_async16(destination + stage + row * pitch, source + row / step * row_stride,
                      row < rows_left && chunk < chunks_inside ? 16 : 0);
  }

  // Any other rows of 16-bit elements, `end` past the first: loaded one by one and stored at once.
  __device__ __forceinline__ void copy_elements(char* strip, const char* end, int64_t stride) const {
    if (!active()) return;
    const int64_t left = end + first_row() * stride - source;  // bytes of the row
#pragma unroll 1
    for (int row = 0; row < rows; row += step) {
      const uint16_t* from = reinterpret_cast<const uint16_t*>(source + row / step * row_stride);
      uint16_t* to = reinterpret_cast<uint16_t*>(strip + place() + row * pitch);
#pragma unroll 1
      for (int i = 0; i < 8; i++) to[i] = row < rows_left && 2 * i < left ? from[i] : 0;
    }
  }

  __device__ __forceinline__ void advance() { source += chunk_bytes; }
};

// Fills the ring: chunk after chunk of the block's 128 rows of W and of all tokens.
template <class Stage>
struct StageLoader {
  const GemmSmall& p;
  char* ring;
  int chunks;
  StripLoader<kGemmOutputs, Stage::row_bytes, Stage::row_pitch> packed;
  StripLoader<Stage::tokens, Stage::token_bytes, Stage::token_pitch> activations;

  __device__ __forceinline__ StageLoader(const GemmSmall& product, char* shared, int64_t first_output,
                                         int64_t first_chunk, int chunk_count)
      : p(product),
        ring(shared),
        chunks(chunk_count),
        packed(ptx::smem_u32(shared), p.weight.codes + first_output * p.weight.row_bytes, p.weight.row_bytes,
               first_chunk * Stage::row_bytes, p.weight.row_bytes, p.weight.out - first_output),
        activations(ptx::smem_u32(shared) + Stage::x_offset, p.x, p.weight.in * 2, first_chunk * Stage::token_bytes,
                    p.weight.in * 2, p.rows) {}

  // Called for chunk after chunk. One group of copies, empty past the last chunk, so that waiting counts the same in
  // every step.
  __device__ __forceinline__ void load_stage(int slot, int chunk) {
    if (chunk < chunks) {
      const int stage = slot * Stage::bytes;
      packed.start_copies(stage, chunk);
      if (p.x_by_16_bytes)
        activations.start_copies(stage, chunk);
      else
        activations.copy_elements(ring + stage + Stage::x_offset, static_cast<const char*>(p.x) + p.weight.in * 2,
                                  p.weight.in * 2);
      packed.advance();
      activations.advance();
    }
    ptx::cp_commit();
  }
};

// Where shared memory keeps the number of a row (0..127) and record of a chunk: fp32 [8][records / 4][16][4], so that a
// lane reads those of four records at once, the lanes of a warp read from all banks, and the next four records lie as
// far on, 256 bytes, as their activations.
constexpr int kNumbersTogether = 4;
template <int records>
__device__ __forceinline__ int number_place(int row, int record) {
  const int four = row / 16 * (records / kNumbersTogether) + record / kNumbersTogether;
  return (four * 16 + row % 16) * kNumbersTogether + record % kNumbersTogether;
}

// The scales (and zero points) of a chunk's records for the block's 128 rows, as fp32 in shared memory. A thread serves
// one record of every `step`-th row. `load` brings the bits of the next chunk's numbers, `store` makes fp32 of them a
// chunk later, so that nothing waits for memory.
template <int bits, bool zeros, int records>
struct ScaleLoader {
  static constexpr int step = kGemmThreads / records, values = kGemmOutputs / step;
  using Loaded = uint32_t[values];
  const GemmSmall& p;
  const float* map;    // dq: [256] in shared memory
  const float offset;  // dq
  int64_t first;       // index of group 0 of this thread's first row
  int rows_left;       // of W, from that row on; numbers of rows past the last stay 0
  int group, within;   // of this thread's record in the next chunk: its group, and its place there
  Loaded scale_bits = {}, zero_bits = {};
  float absmax[values] = {};  // dq

  __device__ __forceinline__ ScaleLoader(const GemmSmall& product, const float* dynamic_map, int64_t first_output,
                                         int64_t first_chunk)
      : p(product), map(dynamic_map), offset(dq() ? *p.weight.offset : 0) {
    const int row = static_cast<int>(threadIdx.x) / records;
    const int64_t left = p.weight.out - first_output, record = first_chunk * records + threadIdx.x % records;
    first = (first_output + row) * p.weight.groups;
    rows_left = static_cast<int>(left < kGemmOutputs ? left : kGemmOutputs) - row;
    group = static_cast<int>(record / p.records_a_group);
    within = static_cast<int>(record % p.records_a_group);
  }

  // of this thread's first row; the others follow kGemmThreads numbers apart, whole warps' rows being between them
  __device__ __forceinline__ static int place() {
    static_assert(step % 16 == 0);
    return number_place<records>(static_cast<int>(threadIdx.x) / records, static_cast<int>(threadIdx.x) % records);
  }
  __device__ __forceinline__ bool dq() const { return p.weight.scale_kind == Scale::dq; }

  // Past the last group, the last one is as good: what it multiplies is 0.
  __device__ __forceinline__ void load() {
    const Weight& w = p.weight;
    const int last = static_cast<int>(w.groups) - 1;
    const int64_t at = first + (group < last ? group : last);
    if (dq()) {
      load_each(static_cast<const uint8_t*>(w.scales), at, scale_bits);
#pragma unroll
      for (int i = 0; i < values; i++)
        if (i * step < rows_left) absmax[i] = w.absmax[static_cast<uint64_t>(at + i * (step * w.groups)) / kDqBlock];
    } else {
      load_numbers(w.scales, static_cast<Dtype>(w.scale_kind), at, scale_bits);
    }
    if constexpr (zeros) load_numbers(w.zeros, w.zero_kind, at, zero_bits);
    group += p.chunk_groups;
    within += p.chunk_records;
    if (within >= p.records_a_group) {
      within -= p.records_a_group;
      group++;
    }
  }

  __device__ __forceinline__ void store(float* scales, float* zero_points) const {
    if (dq()) {  // the roundings of scale_at
#pragma unroll
      for (int i = 0; i < values; i++)
        scales[place() + i * kGemmThreads] = __fadd_rn(__fmul_rn(map[scale_bits[i]], absmax[i]), offset);
    } else {
      store_numbers(scale_bits, static_cast<Dtype>(p.weight.scale_kind), 0, scales);
    }
    // codes are decoded counting from the middle of their range
    if constexpr (zeros) store_numbers(zero_bits, p.weight.zero_kind, 1 << (bits - 1), zero_points);
  }

 private:
  template <class U>
  __device__ __forceinline__ void load_each(const U* numbers, int64_t at, Loaded& loaded) const {
    const U* number = numbers + at;
    const int64_t stride = step * p.weight.groups;
#pragma unroll
    for (int i = 0; i < values; i++) {
      if (i * step < rows_left) loaded[i] = *number;
      number += stride;
    }
  }
  __device__ __forceinline__ void load_numbers(const void* numbers, Dtype dtype, int64_t at, Loaded& loaded) const {
    if (dtype == Dtype::f32)
      load_each(static_cast<const uint32_t*>(numbers), at, loaded);
    else
      load_each(static_cast<const uint16_t*>(numbers), at, loaded);
  }
  __device__ __forceinline__ void store_numbers(const Loaded& loaded, Dtype dtype, float less, float* to) const {
    if (dtype == Dtype::f16) {
#pragma unroll
      for (int i = 0; i < values; i++) {
        const uint16_t half = static_cast<uint16_t>(loaded[i]);
        to[place() + i * kGemmThreads] = to_float(*reinterpret_cast<const __half*>(&half)) - less;
      }
    } else {
      const int shift = dtype == Dtype::bf16 ? 16 : 0;
#pragma unroll
      for (int i = 0; i < values; i++) to[place() + i * kGemmThreads] = __uint_as_float(loaded[i] << shift) - less;
    }
  }
};

// sums += W x over one record, for 16 outputs and 8 * tiles tokens of a warp. `upper` and `lower` are the record's
// codes in rows g and g + 8, scales and zero points likewise, x the octet of token g.
template <class D, int bits, class T, int tiles, bool zeros>
__device__ __forceinline__ void multiply_record(const D& decoder, const OctetReader<bits, D::packed>& octet,
                                                const char* upper, const char* lower, const char* x, int token_pitch,
                                                int rows, const float (&scale)[2], const float (&zero)[2],
                                                float (&sums)[tiles][4]) {
  uint32_t a_upper[4], a_lower[4];
  decoder.eight(octet(upper), a_upper);
  decoder.eight(octet(lower), a_lower);
  const uint32_t first[4] = {a_upper[0], a_lower[0], a_upper[1], a_lower[1]};
  const uint32_t second[4] = {a_upper[2], a_lower[2], a_upper[3], a_lower[3]};
#pragma unroll
  for (int tile = 0; tile < tiles; tile++) {
    // Tiles that the host could not leave out. (Bounds, too, how many tiles the compiler loads ahead: registers.)
    if (tiles > 2 && tile >= tiles / 2 && tile * 8 >= rows) break;
    const uint4 b = *reinterpret_cast<const uint4*>(x + tile * 8 * token_pitch);
    const uint32_t b_first[2] = {b.x, b.y}, b_second[2] = {b.z, b.w};
    float sum[4] = {};
    ptx::mma_m16n8k16<T>(sum, first, b_first);
    ptx::mma_m16n8k16<T>(sum, second, b_second);
    if constexpr (zeros) {  // rows of ones: the sum of x, for every output
      constexpr uint32_t one = is_bf16<T> ? 0x3f803f80u : 0x3c003c00u;
      const uint32_t ones[4] = {one, one, one, one};
      float total[4] = {};
      ptx::mma_m16n8k16<T>(total, ones, b_first);
      ptx::mma_m16n8k16<T>(total, ones, b_second);
      for (int i = 0; i < 4; i++) sum[i] = fmaf(-zero[i / 2], total[i], sum[i]);
    }
    for (int i = 0; i < 4; i++) sums[tile][i] = fmaf(scale[i / 2], sum[i], sums[tile][i]);
  }
}

// A number of the rows g and g + 8 for each of `count` records.
template <int count>
struct RecordNumbers {
  float of[count][2];
  __device__ __forceinline__ explicit RecordNumbers(const char* upper) {
    static_assert(count == 1 || count == 4);
    const char* lower = upper + 8 * kNumbersTogether * 4;
    if constexpr (count == 4) {
      const float4 a = *reinterpret_cast<const float4*>(upper), b = *reinterpret_cast<const float4*>(lower);
      of[0][0] = a.x, of[1][0] = a.y, of[2][0] = a.z, of[3][0] = a.w;
      of[0][1] = b.x, of[1][1] = b.y, of[2][1] = b.z, of[3][1] = b.w;
    } else {
      of[0][0] = *reinterpret_cast<const float*>(upper), of[0][1] = *reinterpret_cast<const float*>(lower);
    }
  }
};

// Lane 4g + c holds, of tile t, tokens 8t + 2c and 8t + 2c + 1 of outputs g and g + 8.
template <class T, int tiles>
__device__ __forceinline__ void store_sums(const GemmSmall& p, int64_t first_output, const float (&sums)[tiles][4]) {
  const int64_t out = p.weight.out;
#pragma unroll
  for (int tile = 0; tile < tiles; tile++)
    for (int i = 0; i < 4; i++) {
      const int token = tile * 8 + threadIdx.x % 4 * 2 + i % 2;
      const int64_t output = first_output + i / 2 * 8;
      if (token >= p.rows || output >= out) continue;
      if (p.partials)
        p.partials[(static_cast<int64_t>(blockIdx.y) * p.rows + token) * out + output] = sums[tile][i];
      else
        static_cast<T*>(p.y)[token * out + output] = from_float<T>(sums[tile][i]);
    }
}

// Block (b, s): outputs [128 b, 128 b + 128), split s of K.
template <class D, int bits, class T, int tiles, bool zeros>
__global__ void __launch_bounds__(kGemmThreads, kGemmBlocksPerSm) gemm_small(const __grid_constant__ GemmSmall p) {
  using Stage = GemmStage<bits, tiles, zeros, D::table_bytes>;
  constexpr int together = tiles + zeros > 2 ? 1 : 4;  // records whose loads overlap; more tokens leave fewer registers
  DYN_SMEM(shared, 16);
  const Weight& w = p.weight;
  const int lane = threadIdx.x % kWarp, g = lane / 4, c = lane % 4;
  const int64_t first_output = blockIdx.x * static_cast<int64_t>(kGemmOutputs);
  const int row = static_cast<int>(threadIdx.x) / kWarp * 16 + g;  // of the block
  const int64_t begin = blockIdx.y * p.codes_a_split;
  const int64_t end = begin + p.codes_a_split < w.in ? begin + p.codes_a_split : w.in;
  const int64_t first_chunk = begin / Stage::codes;
  const int chunks = static_cast<int>((end - begin + Stage::codes - 1) / Stage::codes);

  float* map = reinterpret_cast<float*>(shared + Stage::map_offset);
  StageLoader<Stage> loader(p, shared, first_output, first_chunk, chunks);
  ScaleLoader<bits, zeros, Stage::records> scale_loader(p, map, first_output, first_chunk);
  for (int chunk = 0; chunk < Stage::stages - 1; chunk++) loader.load_stage(chunk, chunk);
  scale_loader.load();

  if (w.scale_kind == Scale::dq)
    for (int i = threadIdx.x; i < 256; i += kGemmThreads) map[i] = w.dynamic_map[i];
  uint32_t* table = reinterpret_cast<uint32_t*>(shared + Stage::table_offset);
  D::fill(p.levels, table);
  __syncthreads();
  const D decoder(table);
  const OctetReader<bits, D::packed> octet(c);
  float* scales = reinterpret_cast<float*>(shared + Stage::scale_offset);
  float* zero_points = reinterpret_cast<float*>(shared + Stage::zero_offset);
  scale_loader.store(scales, zero_points);
  scale_loader.load();

  float sums[tiles][4] = {};
  int slot = 0;
  for (int chunk = 0; chunk < chunks; chunk++) {
    ptx::cp_wait<Stage::stages - 2>();  // this thread's copies to `slot`
    __syncthreads();                    // everyone's, and the scales; nobody reads the slot before it any more
    loader.load_stage(slot == 0 ? Stage::stages - 1 : slot - 1, chunk + Stage::stages - 1);
    const int now = chunk % 2 * Stage::scales, next = Stage::scales - now;
    scale_loader.store(scales + next, zero_points + next);
    scale_loader.load();

    const char* stage = shared + slot * Stage::bytes;
    const char* codes = stage + row * Stage::row_pitch + octet.start;
    const char* x = stage + Stage::x_offset + g * Stage::token_pitch + c * 16;
    const char* scale = reinterpret_cast<const char*>(scales + now + number_place<Stage::records>(row, 0));
    const char* zero = reinterpret_cast<const char*>(zero_points + now + number_place<Stage::records>(row, 0));
#pragma unroll 1
    for (int offset = 0; offset < Stage::token_bytes; offset += together * kRecord * 2) {  // in x
      const int number = together == 4 ? offset : offset / 16;
      const RecordNumbers<together> scale_of(scale + number), zero_of((zeros ? zero : scale) + number);
#pragma unroll
      for (int record = 0; record < together; record++) {
        const char* upper = codes + record * (4 * bits);
        multiply_record<D, bits, T, tiles, zeros>(decoder, octet, upper, upper + 8 * Stage::row_pitch,
                                                  x + offset + record * (kRecord * 2), Stage::token_pitch, p.rows,
                                                  scale_of.of[record], zero_of.of[record], sums);
      }
      codes += together * (4 * bits);
    }
    slot = slot + 1 == Stage::stages ? 0 : slot + 1;
  }
  store_sums<T, tiles>(p, first_output + row, sums);
}

// y = the sum of the splits, in their order.
template <class T>
__global__ void add_splits(const float* partials, int splits, int64_t count, T* y) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) {
    float sum = 0;
    for (int split = 0; split < splits; split++) sum += partials[split * count + i];
    y[i] = from_float<T>(sum);
  }
}

struct Splits {
  int count;      // 0 where there is nothing to add
  int64_t codes;  // of each, the last excepted
};

// How many blocks share K. The device runs `slots` blocks at a time, so the time is the number of waves times the steps
// of one block; a block also costs its prologue and its partial sums, and a second kernel is only worth a real gain.
static inline Splits choose_splits(int64_t out, int64_t in, int device) {
  constexpr int64_t most = 32, overhead = 2;  // overhead in steps of kSplitCodes; an estimate, not a measurement
  const int64_t tiles = (out + kGemmOutputs - 1) / kGemmOutputs, steps = (in + kSplitCodes - 1) / kSplitCodes;
  const int64_t slots = static_cast<int64_t>(multiprocessors(device)) * kGemmBlocksPerSm;
  int64_t best = 0, each = steps;
  for (int64_t splits = 1; splits <= std::min(most, steps); splits++) {
    const int64_t share = (steps + splits - 1) / splits;
    if ((steps + share - 1) / share != splits) continue;  // another count has this share
    const int64_t waves = (tiles * splits + slots - 1) / slots;
    const int64_t time = waves * (share + overhead) + (splits > 1 ? overhead : 0);
    if (splits == 1 || time < best) best = time, each = share;
  }
  return {each ? static_cast<int>((steps + each - 1) / each) : 0, each * kSplitCodes};
}

// floats of scratch that `matmul` needs: the partial sums of one launch
static int64_t matmul_workspace(int64_t out, int64_t in, int64_t rows, int device) {
  const int splits = choose_splits(out, in, device).count;
  return splits > 1 ? splits * std::min<int64_t>(rows, kGemmRows) * out : 0;
}

template <class F, class T, int tiles, bool zeros, bool pair_table>
void launch_gemm_small(GemmSmall p, int splits, const Place& place) {
  using D = Decoder<F, T, pair_table>;
  using Stage = GemmStage<F::bits, tiles, zeros, D::table_bytes>;
  p.records_a_group = static_cast<int>((p.weight.group + kRecord - 1) / kRecord);
  p.chunk_groups = Stage::records / p.records_a_group;
  p.chunk_records = Stage::records % p.records_a_group;
  const dim3 grid(static_cast<unsigned>((p.weight.out + kGemmOutputs - 1) / kGemmOutputs), splits);
  launch(place, gemm_small<D, F::bits, T, tiles, zeros>, grid, kGemmThreads, Stage::shared_bytes, p);
}

template <class F, class T, bool zeros>
void launch_tiles(const GemmSmall& p, int splits, int pair_table_rows, const Place& place) {
  constexpr bool two_bits = F::bits == 2, sixteen_levels = F::kind == Levels::codebook && F::bits == 4;
  if constexpr (two_bits || sixteen_levels)
    if (p.rows <= 16 && (two_bits || p.rows <= pair_table_rows)) {
      if (p.rows <= 8) return launch_gemm_small<F, T, 1, zeros, true>(p, splits, place);
      return launch_gemm_small<F, T, 2, zeros, true>(p, splits, place);
    }
  if constexpr (!two_bits) {
    if (p.rows <= 8) return launch_gemm_small<F, T, 1, zeros, false>(p, splits, place);
    if (p.rows <= 16) return launch_gemm_small<F, T, 2, zeros, false>(p, splits, place);
  }
  if (p.rows <= 32) return launch_gemm_small<F, T, 4, zeros, false>(p, splits, place);
  launch_gemm_small<F, T, 8, zeros, false>(p, splits, place);
}

// y = x Wt, 64 rows at a time.
template <class F, class T>
void matmul_in(const MatmulArgs& a) {
  const Splits splits = choose_splits(a.weight.out, a.weight.in, a.place.device);
  Weight symmetric = a.weight;
  symmetric.zeros = nullptr;  // integers count from the middle: see Computed and ScaleLoader
  GemmSmall p = {};
  p.weight = a.weight;
  p.levels = level_table<F>(symmetric);
  p.partials = splits.count > 1 ? a.workspace : nullptr;
  p.codes_a_split = splits.codes;
  for (int64_t row = 0; row < a.rows; row += kGemmRows) {
    p.rows = static_cast<int>(std::min<int64_t>(a.rows - row, kGemmRows));
    p.x = static_cast<const T*>(a.x) + row * a.weight.in;
    p.y = static_cast<T*>(a.y) + row * a.weight.out;
    p.x_by_16_bytes = a.weight.in % 8 == 0 && reinterpret_cast<uintptr_t>(p.x) % 16 == 0;
    if (splits.count) {
      if constexpr (F::may_have_zeros) {
        if (a.weight.zeros)
          launch_tiles<F, T, true>(p, splits.count, a.pair_table_rows, a.place);
        else
          launch_tiles<F, T, false>(p, splits.count, a.pair_table_rows, a.place);
      } else {
        launch_tiles<F, T, false>(p, splits.count, a.pair_table_rows, a.place);
      }
    }
    if (splits.count != 1) {
      constexpr int threads = 256;
      const int64_t count = p.rows * a.weight.out, blocks = (count + threads - 1) / threads;
      launch(a.place, add_splits<T>, dim3(static_cast<unsigned>(std::min<int64_t>(blocks, 1 << 20))), threads, 0,
             p.partials, splits.count, count, static_cast<T*>(p.y));
    }
  }
}

template <class F>
void matmul(const MatmulArgs& a) {
  if (a.dtype == Dtype::f32)
    throw std::runtime_error(
        "matmul on CUDA multiplies bf16 or fp16 activations, not fp32: convert x, or dequantize the weight and use a "
        "dense product");
  if (a.rows == 0 || a.weight.out == 0) return;
  if (a.dtype == Dtype::bf16)
    matmul_in<F, __nv_bfloat16>(a);
  else
    matmul_in<F, __half>(a);
}

}  // namespace qft::QFT_ISA

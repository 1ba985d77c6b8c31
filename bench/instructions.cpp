// Calls verbs of the kernels linked with it, so that bench/instructions.py can count their instructions. No Python, no
// torch, one thread.
//
//   instructions       each call once, inside `counted`, which callgrind collects
//   instructions trap  each call once with the processor's trap flag set: after every instruction a signal handler
//                      notes its address, so that code valgrind cannot run is counted too
//
// Standard input has one call a line: index of the kernels in the registry, verb, bits, columns and rows of W, rows of
// x, 1 where scales are double-quantized, 1 where there are zero points, factors of a scale search. Trapped calls print
// a line `call`, then `address count` for every instruction of this program that ran, in hexadecimal and decimal, and
// `outside count` for the libraries'.
#include <signal.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <iostream>
#include <string>
#include <vector>

#include "qft/cpu/numbers.h"
#include "qft/launch.h"

extern "C" const char __executable_start, etext;  // the linker's

namespace qft {
extern const Kernels* const kBuiltKernels[];  // the registry that qft.compiler emits
}  // namespace qft

// The allocator of the whole program, OpenMP's library included. It takes the same path at every call, which the
// system's does not, and gives nothing back.
namespace {
alignas(4096) char memory[256 << 20];
size_t used;
}  // namespace
#pragma GCC visibility push(default)
extern "C" {
void* memalign(size_t alignment, size_t bytes) noexcept {
  used = (used + alignment - 1) / alignment * alignment + bytes;
  if (used > sizeof memory) _exit(1);
  return memory + used - bytes;
}
void* aligned_alloc(size_t alignment, size_t bytes) noexcept { return memalign(alignment, bytes); }
int posix_memalign(void** to, size_t alignment, size_t bytes) noexcept {
  *to = memalign(alignment, bytes);
  return 0;
}
void* malloc(size_t bytes) noexcept { return memalign(64, bytes); }
void* calloc(size_t count, size_t bytes) noexcept { return memalign(64, count * bytes); }  // never used before: zeros
void* realloc(void* old, size_t bytes) noexcept {
  char* grown = static_cast<char*>(malloc(bytes));
  const char* from = static_cast<const char*>(old);
  for (size_t i = 0; from && i < bytes && from + i < grown; i++) grown[i] = from[i];
  return grown;
}
void free(void*) noexcept {}
}
#pragma GCC visibility pop

namespace {

using qft::Dtype;
using qft::Place;
using qft::Scale;

constexpr int64_t kGroup = 64;
constexpr Place kPlace = {1, 0, nullptr};

struct Call {
  int kernels;
  std::string verb;
  int bits;
  int64_t columns, outputs, rows;
  bool double_quantized, zero;
  int factors;
};

// bf16 numbers in (-1, 1), alike in every run
std::vector<uint16_t> numbers(int64_t count) {
  std::vector<uint16_t> drawn(static_cast<size_t>(count));
  uint32_t state = 1;
  for (uint16_t& number : drawn) {
    state = state * 1664525u + 1013904223u;
    number = qft::to_bf16(static_cast<float>(static_cast<int32_t>(state)) * 0x1p-31f);
  }
  return drawn;
}

// Everything that the verbs read and write, and the arguments that point there.
struct Arrays {
  const qft::Kernels& kernels;
  int64_t groups, row_bytes, bad = 0;
  std::vector<uint16_t> dense, x, dy, y, dx, out;
  std::vector<uint8_t> codes, scale_codes;
  std::vector<float> scales, zeros, absmax, map, levels, factors, workspace, ds;
  float offset = 0;
  qft::QuantizeArgs quantize{};
  qft::DequantizeArgs dequantize{};
  qft::MatmulArgs matmul{};
  qft::MatmulTArgs matmul_t{};
  qft::ScaleGradArgs scale_grad{};

  Arrays(const Arrays&) = delete;
  Arrays& operator=(const Arrays&) = delete;
  explicit Arrays(const Call& call)
      : kernels(*qft::kBuiltKernels[call.kernels]),
        groups(call.columns / kGroup),
        row_bytes(qft::packed_bytes(call.bits, call.columns)),
        dense(numbers(call.outputs * call.columns)),
        x(numbers(call.rows * call.columns)),
        dy(numbers(call.rows * call.outputs)),
        y(dy.size()),
        dx(x.size()),
        out(dense.size()),
        codes(static_cast<size_t>(call.outputs * row_bytes)),
        scale_codes(static_cast<size_t>(call.outputs * groups), 200),
        scales(scale_codes.size()),
        zeros(scales.size()),
        absmax(scales.size() / qft::kDqBlock + 1, 1),
        map(256, 0.5f),
        levels(16),
        workspace(static_cast<size_t>(kernels.matmul_workspace(call.outputs, call.columns, call.rows, 0))),
        ds(scales.size()) {
    for (int i = 0; i < 16; i++) levels[i] = static_cast<float>(i) / 8 - 1;
    for (int i = 0; i < call.factors; i++) factors.push_back(1 - static_cast<float>(i) / 64);
    quantize.weight = dense.data();
    quantize.out = call.outputs;
    quantize.in = call.columns;
    quantize.row_bytes = row_bytes;
    quantize.group = kGroup;
    quantize.groups = groups;
    quantize.dtype = Dtype::bf16;
    quantize.zero = call.zero;
    quantize.scale_kind = Scale::f32;
    quantize.zero_kind = Dtype::f32;
    quantize.levels = levels.data();
    quantize.count = 1 << (call.bits < 8 ? call.bits : 4);
    quantize.factors = call.factors ? factors.data() : nullptr;
    quantize.factor_count = call.factors;
    quantize.codes = codes.data();
    quantize.scales = scales.data();
    quantize.zeros = call.zero ? zeros.data() : nullptr;
    quantize.bad = &bad;
    quantize.place = kPlace;
    kernels.quantize(quantize);

    qft::Weight weight{};
    weight.codes = codes.data();
    weight.scales = call.double_quantized ? static_cast<const void*>(scale_codes.data()) : scales.data();
    weight.zeros = quantize.zeros;
    weight.absmax = absmax.data();
    weight.offset = &offset;
    weight.dynamic_map = map.data();
    weight.levels = levels.data();
    weight.out = call.outputs;
    weight.in = call.columns;
    weight.row_bytes = row_bytes;
    weight.group = kGroup;
    weight.groups = groups;
    weight.scale_kind = call.double_quantized ? Scale::dq : Scale::f32;
    weight.zero_kind = Dtype::f32;

    dequantize.weight = matmul.weight = matmul_t.weight = scale_grad.weight = weight;
    dequantize.row1 = scale_grad.row1 = call.outputs;
    dequantize.col1 = dequantize.stride = call.columns;
    dequantize.out = out.data();
    matmul.x = x.data();
    matmul.y = y.data();
    matmul.rows = matmul_t.rows = call.rows;
    matmul.workspace = workspace.data();
    matmul_t.dy = dy.data();
    matmul_t.dx = dx.data();
    scale_grad.dw = dense.data();
    scale_grad.ds = ds.data();
    dequantize.dtype = matmul.dtype = matmul_t.dtype = scale_grad.dtype = Dtype::bf16;
    dequantize.place = matmul.place = matmul_t.place = scale_grad.place = kPlace;
  }

  void run(const std::string& verb) const {
    if (verb == "quantize") kernels.quantize(quantize);
    if (verb == "dequantize") kernels.dequantize(dequantize);
    if (verb == "matmul") kernels.matmul(matmul);
    if (verb == "matmul_t") kernels.matmul_t(matmul_t);
    if (verb == "scale_grad") kernels.scale_grad(scale_grad);
  }
};

std::vector<uint32_t> ran;  // times, by the address of an instruction of this program
uint64_t ran_outside;
uintptr_t start;

void note(int, siginfo_t*, void* context) {
  const auto at = static_cast<uintptr_t>(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]) - start;
  if (at < ran.size())
    ran[at]++;
  else
    ran_outside++;
}

}  // namespace

// 128 bytes below the stack pointer may be in use
extern "C" __attribute__((noinline)) void counted(const Arrays& arrays, const std::string& verb, bool trap) {
  if (trap) asm volatile("sub $128, %%rsp; pushfq; orl $0x100, (%%rsp); popfq; add $128, %%rsp" ::: "memory", "cc");
  arrays.run(verb);
  if (trap) asm volatile("sub $128, %%rsp; pushfq; andl $~0x100, (%%rsp); popfq; add $128, %%rsp" ::: "memory", "cc");
}

int main(int argc, char** argv) {
  const bool trap = argc > 1 && !std::strcmp(argv[1], "trap");
  if (trap) {
    start = reinterpret_cast<uintptr_t>(&__executable_start);
    ran.resize(reinterpret_cast<uintptr_t>(&etext) - start);
    struct sigaction action{};
    action.sa_sigaction = note;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGTRAP, &action, nullptr);
  }
  Call call;
  while (std::cin >> call.kernels >> call.verb >> call.bits >> call.columns >> call.outputs >> call.rows >>
         call.double_quantized >> call.zero >> call.factors) {
    const Arrays arrays(call);
    arrays.run(call.verb);  // the first call of a program resolves names and starts the thread pool
    ran.assign(ran.size(), 0);
    ran_outside = 0;
    counted(arrays, call.verb, trap);
    if (!trap) continue;
    std::puts("call");
    for (size_t at = 0; at < ran.size(); at++)
      if (ran[at]) std::printf("%zx %u\n", at + start, ran[at]);
    std::printf("outside %llu\n", static_cast<unsigned long long>(ran_outside));
  }
}

// The verbs of one code's kernels, run in the emulator: each call registers every array of the arguments at its exact
// size and use, launches, and says what was wrong: as a text, or thrown as the CUDA build throws what the driver says.
// The code's own source is linked beside this file and gives `plain_kernels`.
#include <stdexcept>
#include <string>
#include <vector>

#include "host.h"
#include "qft/launch.h"

SIMT_EXPORT const qft::Kernels* plain_kernels();

namespace {

std::string text;  // of the last error

// The arrays of one call.
class Arrays {
 public:
  Arrays() { simt::clear_buffers(); }

  void input(const void* p, int64_t bytes, const char* name) const { add(p, bytes, name, simt::IN); }
  // initialised before, some of it written after
  void changed(const void* p, int64_t bytes, const char* name) const { add(p, bytes, name, simt::INOUT); }
  // uninitialised before, wholly written after
  void output(const void* p, int64_t bytes, const char* name) {
    add(p, bytes, name, simt::OUT);
    if (p && bytes) outputs_.push_back({p, name});
  }
  // uninitialised before; what is read of it must have been written
  void scratch(const void* p, int64_t bytes, const char* name) const { add(p, bytes, name, simt::OUT); }

  // rows of `columns` elements, `stride` elements apart: what lies between them is nobody's to touch
  void output_rows(const void* p, int64_t rows, int64_t columns, int64_t stride, int64_t size, const char* name) {
    if (stride == columns) return output(p, rows * columns * size, name);
    for (int64_t row = 0; row < rows; row++)
      output(static_cast<const char*>(p) + row * stride * size, columns * size, name);
  }

  // rows row0 .. row1 - 1; another row is out of bounds
  void weight(const qft::Weight& w, int64_t row0, int64_t row1) const;

  // the name of an output that a thread should have written and none has, or null
  const char* unwritten() const {
    for (const Output& output : outputs_)
      if (simt::unwritten(output.p)) return output.name;
    return nullptr;
  }

 private:
  struct Output {
    const void* p;
    const char* name;
  };
  std::vector<Output> outputs_;

  static void add(const void* p, int64_t bytes, const char* name, simt::Use use) {
    if (p && bytes) simt::add_buffer(p, static_cast<size_t>(bytes), name, use);
  }
};

int64_t bytes_of(qft::Dtype dtype) { return dtype == qft::Dtype::f32 ? 4 : 2; }
int64_t bytes_of(qft::Scale scale) { return scale == qft::Scale::dq ? 1 : bytes_of(static_cast<qft::Dtype>(scale)); }

// Levels are left out: they are host memory, and no kernel may read them.
void Arrays::weight(const qft::Weight& w, int64_t row0, int64_t row1) const {
  const auto rows = [&](const void* p, int64_t row_bytes, const char* name) {
    if (p) input(static_cast<const char*>(p) + row0 * row_bytes, (row1 - row0) * row_bytes, name);
  };
  rows(w.codes, w.row_bytes, "codes");
  rows(w.scales, w.groups * bytes_of(w.scale_kind), "scales");
  rows(w.zeros, w.groups * bytes_of(w.zero_kind), "zeros");
  const int64_t first = row0 * w.groups / qft::kDqBlock, last = (row1 * w.groups + qft::kDqBlock - 1) / qft::kDqBlock;
  if (w.absmax) input(w.absmax + first, (last - first) * 4, "absmax");
  input(w.offset, 4, "offset");
  input(w.dynamic_map, 256 * 4, "dynamic_map");
}

void declare(Arrays& arrays, const qft::QuantizeArgs& a) {
  const int64_t count = a.out * a.groups;
  arrays.input(a.weight, a.out * a.in * bytes_of(a.dtype), "weight");
  arrays.input(a.factors, a.factor_count * 4, "factors");
  arrays.input(a.importance, a.in * 4, "importance");
  arrays.output(a.codes, a.out * a.row_bytes, "codes");
  arrays.output(a.scales, count * (a.scale_kind == qft::Scale::dq ? 4 : bytes_of(a.scale_kind)), "scales");
  arrays.output(a.zeros, count * bytes_of(a.zero_kind), "zeros");
  arrays.output(a.bad, 8, "bad");
}

void declare(Arrays& arrays, const qft::DequantizeArgs& a) {
  arrays.weight(a.weight, a.row0, a.row1);
  arrays.output_rows(a.out, a.row1 - a.row0, a.col1 - a.col0, a.stride, bytes_of(a.dtype), "out");
}

void declare(Arrays& arrays, const qft::MatmulArgs& a) {
  const int64_t size = bytes_of(a.dtype);
  arrays.weight(a.weight, 0, a.weight.out);
  arrays.input(a.x, a.rows * a.weight.in * size, "x");
  arrays.output(a.y, a.rows * a.weight.out * size, "y");
  arrays.scratch(a.workspace, 4 * plain_kernels()->matmul_workspace(a.weight.out, a.weight.in, a.rows, a.place.device),
                 "workspace");
}

void declare(Arrays& arrays, const qft::ScaleGradArgs& a) {
  const int64_t rows = a.row1 - a.row0;
  arrays.weight(a.weight, a.row0, a.row1);
  arrays.input(a.dw, rows * a.weight.in * bytes_of(a.dtype), "dw");
  arrays.output(a.ds, rows * a.weight.groups * 4, "ds");
}

void declare(Arrays& arrays, const qft::ZeroScaleGradArgs& a) {
  const int64_t size = bytes_of(a.dtype);
  arrays.weight(a.weight, 0, a.weight.out);
  arrays.input(a.dy, a.rows * a.weight.out * size, "dy");
  arrays.input(a.x, a.rows * a.weight.in * size, "x");
  arrays.changed(a.ds, a.weight.out * 4, "ds");
}

void declare(Arrays& arrays, const qft::DotColumnsArgs& a) {
  const int64_t bytes = a.rows * a.columns * bytes_of(a.dtype);
  arrays.input(a.a, bytes, "a");
  arrays.input(a.b, bytes, "b");
  arrays.output(a.total, a.columns * 4, "total");
  arrays.scratch(a.workspace, 4 * plain_kernels()->dot_columns_workspace(a.rows, a.columns, a.place.device),
                 "workspace");
}

template <class Args>
const char* run(void (*verb)(const Args&), const Args& args) {
  if (!verb) return "the library was built without this verb";
  Arrays arrays;
  declare(arrays, args);
  try {
    verb(args);
  } catch (const std::exception& error) {
    text = error.what();
    return text.c_str();
  }
  const char* name = arrays.unwritten();
  if (!name) return nullptr;
  text = std::string(name) + " is not fully written";
  return text.c_str();
}

template <class Args, void (*qft::Kernels::*verb)(const Args&)>
void checked(const Args& args) {
  if (const char* error = run(plain_kernels()->*verb, args)) throw std::runtime_error(error);
}

}  // namespace

// What qft loads like any library of kernels: the same verbs, each checked as above.
SIMT_EXPORT const qft::Kernels* qft_kernels() {
  using qft::Kernels;
  static Kernels kernels = *plain_kernels();
  kernels.quantize = checked<qft::QuantizeArgs, &Kernels::quantize>;
  kernels.dequantize = checked<qft::DequantizeArgs, &Kernels::dequantize>;
  kernels.matmul = checked<qft::MatmulArgs, &Kernels::matmul>;
  kernels.scale_grad = checked<qft::ScaleGradArgs, &Kernels::scale_grad>;
  kernels.dot_columns = checked<qft::DotColumnsArgs, &Kernels::dot_columns>;
  kernels.zero_scale_grad = checked<qft::ZeroScaleGradArgs, &Kernels::zero_scale_grad>;
  return &kernels;
}

SIMT_EXPORT const char* run_quantize(const qft::QuantizeArgs* a) { return run(plain_kernels()->quantize, *a); }
SIMT_EXPORT const char* run_dequantize(const qft::DequantizeArgs* a) { return run(plain_kernels()->dequantize, *a); }
SIMT_EXPORT const char* run_matmul(const qft::MatmulArgs* a) { return run(plain_kernels()->matmul, *a); }
SIMT_EXPORT const char* run_scale_grad(const qft::ScaleGradArgs* a) { return run(plain_kernels()->scale_grad, *a); }
SIMT_EXPORT const char* run_dot_columns(const qft::DotColumnsArgs* a) { return run(plain_kernels()->dot_columns, *a); }

SIMT_EXPORT const char* run_zero_scale_grad(const qft::ZeroScaleGradArgs* a) {
  return run(plain_kernels()->zero_scale_grad, *a);
}

SIMT_EXPORT int64_t matmul_workspace(int64_t out, int64_t in, int64_t rows) {
  return plain_kernels()->matmul_workspace(out, in, rows, 0);
}
SIMT_EXPORT int64_t dot_columns_workspace(int64_t rows, int64_t columns) {
  return plain_kernels()->dot_columns_workspace(rows, columns, 0);
}

// Bytes of the structs above in the order of their names, for the caller to hold its own against.
SIMT_EXPORT void struct_sizes(int64_t* sizes) {
  for (size_t size : {sizeof(qft::DequantizeArgs), sizeof(qft::DotColumnsArgs), sizeof(qft::MatmulArgs),
                      sizeof(qft::QuantizeArgs), sizeof(qft::ScaleGradArgs), sizeof(qft::ZeroScaleGradArgs)})
    *sizes++ = static_cast<int64_t>(size);
}

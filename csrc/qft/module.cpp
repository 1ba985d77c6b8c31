// The doorway from Python: argument structs filled field by field, the GIL released around every verb. No logic lives
// here. What a forward or backward pass calls takes its arguments by position too: keywords double the time of a call.
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "qft/launch.h"
#include "qft/pages.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace qft {
extern const Kernels* const kBuiltKernels[];
extern const int kBuiltKernelCount;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> found{"scalar"};
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  if (avx2) found.push_back("avx2");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    found.push_back("avx512");
    if (__builtin_cpu_supports("avx512bf16")) found.push_back("avx512_bf16");
  }
#endif
  return found;
}

std::vector<const Kernels*> built_kernels() { return {kBuiltKernels, kBuiltKernels + kBuiltKernelCount}; }

// The kernels of a library made by qft.compile; it stays loaded for the life of the process.
const Kernels* load_kernels(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) throw py::import_error(dlerror());
  auto kernels = reinterpret_cast<const Kernels* (*)()>(dlsym(library, "qft_kernels"));
  if (!kernels) throw py::import_error(dlerror());
  return kernels();
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  py::enum_<Dtype>(m, "Dtype").value("f32", Dtype::f32).value("f16", Dtype::f16).value("bf16", Dtype::bf16);
  py::enum_<Scale>(m, "Scale")
      .value("f32", Scale::f32)
      .value("f16", Scale::f16)
      .value("bf16", Scale::bf16)
      .value("dq", Scale::dq);

  py::class_<Weight>(m, "Weight")
      .def(py::init([](uintptr_t codes, uintptr_t scales, uintptr_t zeros, uintptr_t absmax, uintptr_t offset,
                       uintptr_t dynamic_map, uintptr_t levels, int64_t out, int64_t in, int64_t row_bytes,
                       int64_t group, int64_t groups, Scale scale_kind, Dtype zero_kind) {
             return Weight{pointer<const uint8_t>(codes),
                           pointer<const void>(scales),
                           pointer<const void>(zeros),
                           pointer<const float>(absmax),
                           pointer<const float>(offset),
                           pointer<const float>(dynamic_map),
                           pointer<const float>(levels),
                           out,
                           in,
                           row_bytes,
                           group,
                           groups,
                           scale_kind,
                           zero_kind};
           }),
           py::kw_only(), "codes"_a, "scales"_a, "zeros"_a, "absmax"_a, "offset"_a, "dynamic_map"_a, "levels"_a,
           "out"_a, "in_"_a, "row_bytes"_a, "group"_a, "groups"_a, "scale_kind"_a, "zero_kind"_a);

  py::class_<Place>(m, "Place")
      .def(py::init(
               [](int threads, int device, uintptr_t stream) { return Place{threads, device, pointer<void>(stream)}; }),
           py::kw_only(), "threads"_a, "device"_a, "stream"_a);

  using Released = py::call_guard<py::gil_scoped_release>;
  py::class_<Kernels>(m, "Kernels")
      .def_property_readonly("code", [](const Kernels& k) { return k.code; })
      .def_property_readonly("isa", [](const Kernels& k) { return k.isa; })
      .def(
          "quantize",
          [](const Kernels& k, uintptr_t weight, int64_t out, int64_t in, int64_t row_bytes, int64_t group,
             int64_t groups, Dtype dtype, bool zero, Scale scale_kind, Dtype zero_kind, uintptr_t levels, int count,
             uintptr_t factors, int factor_count, uintptr_t importance, uintptr_t codes, uintptr_t scales,
             uintptr_t zeros, uintptr_t bad, const Place& place) {
            k.quantize({pointer<const void>(weight),
                        out,
                        in,
                        row_bytes,
                        group,
                        groups,
                        dtype,
                        zero,
                        scale_kind,
                        zero_kind,
                        pointer<const float>(levels),
                        count,
                        pointer<const float>(factors),
                        factor_count,
                        pointer<const float>(importance),
                        pointer<uint8_t>(codes),
                        pointer<void>(scales),
                        pointer<void>(zeros),
                        pointer<int64_t>(bad),
                        place});
          },
          py::kw_only(), "weight"_a, "out"_a, "in_"_a, "row_bytes"_a, "group"_a, "groups"_a, "dtype"_a, "zero"_a,
          "scale_kind"_a, "zero_kind"_a, "levels"_a, "count"_a, "factors"_a, "factor_count"_a, "importance"_a,
          "codes"_a, "scales"_a, "zeros"_a, "bad"_a, "place"_a, Released())
      .def(
          "dequantize",
          [](const Kernels& k, const Weight& weight, int64_t row0, int64_t row1, int64_t col0, int64_t col1,
             uintptr_t out, int64_t stride, Dtype dtype, const Place& place) {
            k.dequantize({weight, row0, row1, col0, col1, pointer<void>(out), stride, dtype, place});
          },
          "weight"_a, "row0"_a, "row1"_a, "col0"_a, "col1"_a, "out"_a, "stride"_a, "dtype"_a, "place"_a, Released())
      .def(
          "matmul",
          [](const Kernels& k, const Weight& weight, uintptr_t x, uintptr_t y, int64_t rows, Dtype dtype,
             uintptr_t workspace, int pair_table_rows, const Place& place) {
            k.matmul({weight, pointer<const void>(x), pointer<void>(y), rows, dtype, pointer<float>(workspace),
                      pair_table_rows, place});
          },
          "weight"_a, "x"_a, "y"_a, "rows"_a, "dtype"_a, "workspace"_a, "pair_table_rows"_a, "place"_a, Released())
      .def(
          "matmul_t",
          [](const Kernels& k, const Weight& weight, uintptr_t dy, uintptr_t dx, int64_t rows, Dtype dtype,
             const Place& place) {
            k.matmul_t({weight, pointer<const void>(dy), pointer<void>(dx), rows, dtype, place});
          },
          "weight"_a, "dy"_a, "dx"_a, "rows"_a, "dtype"_a, "place"_a, Released())
      .def(
          "scale_grad",
          [](const Kernels& k, const Weight& weight, int64_t row0, int64_t row1, uintptr_t dw, Dtype dtype,
             uintptr_t ds, const Place& place) {
            k.scale_grad({weight, row0, row1, pointer<const void>(dw), dtype, pointer<float>(ds), place});
          },
          "weight"_a, "row0"_a, "row1"_a, "dw"_a, "dtype"_a, "ds"_a, "place"_a, Released())
      .def(
          "dot_columns",
          [](const Kernels& k, uintptr_t a, uintptr_t b, int64_t rows, int64_t columns, Dtype dtype, uintptr_t total,
             uintptr_t workspace, const Place& place) {
            k.dot_columns({pointer<const void>(a), pointer<const void>(b), rows, columns, dtype, pointer<float>(total),
                           pointer<float>(workspace), place});
          },
          "a"_a, "b"_a, "rows"_a, "columns"_a, "dtype"_a, "total"_a, "workspace"_a, "place"_a, Released())
      .def(
          "zero_scale_grad",
          [](const Kernels& k, const Weight& weight, uintptr_t dy, uintptr_t x, int64_t rows, Dtype dtype, uintptr_t ds,
             const Place& place) {
            k.zero_scale_grad(
                {weight, pointer<const void>(dy), pointer<const void>(x), rows, dtype, pointer<float>(ds), place});
          },
          "weight"_a, "dy"_a, "x"_a, "rows"_a, "dtype"_a, "ds"_a, "place"_a, Released())
      .def(
          "matmul_workspace",
          [](const Kernels& k, int64_t out, int64_t in, int64_t rows, int device) {
            return k.matmul_workspace(out, in, rows, device);
          },
          "out"_a, "in_"_a, "rows"_a, "device"_a)
      .def(
          "dot_columns_workspace",
          [](const Kernels& k, int64_t rows, int64_t columns, int device) {
            return k.dot_columns_workspace(rows, columns, device);
          },
          "rows"_a, "columns"_a, "device"_a);

  m.def("instruction_sets", &instruction_sets,
        "The instruction sets of this processor that kernels exist for, plainest first.");
  m.def("built_kernels", &built_kernels, py::return_value_policy::reference, "The kernels compiled ahead of time.");
  m.def("load_kernels", &load_kernels, py::return_value_policy::reference, "path"_a,
        "Load a library made by qft.compile.");
  m.def("ask_for_huge_pages", &ask_for_huge_pages, "address"_a, "bytes"_a,
        "Ask for pages of 2 MiB where memory that was not written yet holds whole ones.");
  m.attr("BLOCK") = kBlock;
#ifdef QFT_CUDA_TARGETS
  m.attr("CUDA_TARGETS") = QFT_CUDA_TARGETS;
#else
  m.attr("CUDA_TARGETS") = "";
#endif
}

}  // namespace qft

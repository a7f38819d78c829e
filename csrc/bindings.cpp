// The module fastconv._C; no algorithm in it. Only this file and csrc/eager know Python. Tensors arrive as addresses, and in
// csrc/eager as Python objects that DLPack reads, so that no torch header is needed to build this.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>

#include "core/cascade.h"
#include "core/freed_memory.h"
#include "core/gpu.h"
#include "core/machine_info.h"
#include "core/parallel.h"
#include "core/peak.h"
#include "core/select.h"
#include "eager/any_plan.h"
#include "eager/calls.h"
#include "eager/scratch.h"

namespace py = pybind11;

namespace fastconv {
namespace {

using Pair = std::array<int64_t, 2>;
using Quad = std::array<int64_t, 4>;
using Quint = std::array<int64_t, 5>;

Dtype parse_dtype(const std::string& name) {
  if (name == "f32") return Dtype::f32;
  if (name == "f64") return Dtype::f64;
  if (name == "bf16") return Dtype::bf16;
  if (name == "f16") return Dtype::f16;
  throw std::invalid_argument("dtype: got '" + name + "', expected f32, f64, bf16 or f16");
}

Activation parse_activation(const std::string& name) {
  constexpr const char* kNames[] = {"none", "relu", "relu6", "silu", "hardswish", "gelu", "gelu_tanh", "sigmoid"};
  for (int i = 0; i < int(std::size(kNames)); ++i) {
    if (name == kNames[i]) return Activation(i);
  }
  throw std::invalid_argument("activation: got '" + name +
                              "', expected none, relu, relu6, silu, hardswish, gelu, gelu_tanh or sigmoid");
}

Stride4 stride4(const Quad& s) { return {s[0], s[1], s[2], s[3]}; }

SdpaStride sdpa_stride(const Quad& s) { return {s[0], s[1], s[2], s[3]}; }

MaskKind parse_mask(const std::string& name) {
  if (name == "none") return MaskKind::none;
  if (name == "boolean") return MaskKind::boolean;
  if (name == "additive") return MaskKind::additive;
  if (name == "wide") return MaskKind::wide;
  throw std::invalid_argument("mask: got '" + name + "', expected none, boolean, additive or wide");
}

template <class T>
T* address(uintptr_t value) {
  return reinterpret_cast<T*>(value);
}

// Runs a plan in the given scratch, or in the thread's own, which is the CPU's.
template <class Args>
void run(const AnyPlan& plan, const Args& args, std::optional<uintptr_t> workspace, uintptr_t stream) {
  if (!workspace && plan.device() != kCpu) throw std::invalid_argument("a plan for a GPU needs its workspace's address");
  const Scratch scratch(workspace ? 0 : plan.workspace());
  py::gil_scoped_release release;
  plan.run(args, workspace ? address<void>(*workspace) : scratch.data(), address<void>(stream));
}

void run_conv2d(const AnyPlan& plan, uintptr_t x, uintptr_t w, uintptr_t bias, uintptr_t residual, uintptr_t y, uintptr_t packed,
                std::optional<uintptr_t> workspace, uintptr_t stream) {
  run(plan,
      Conv2dArgs{address<void>(x), address<void>(w), address<void>(bias), address<void>(residual), address<void>(y),
                 address<void>(packed)},
      workspace, stream);
}

Cascade cascade_of(const std::vector<const AnyPlan*>& plans) {
  std::vector<Plan<Conv2dProblem>> whole;
  for (const AnyPlan* plan : plans) whole.push_back(plan->conv2d());
  return Cascade(std::move(whole));
}

// Addresses of each convolution's w, bias and packed.
void run_cascade(const Cascade& cascade, uintptr_t x, uintptr_t residual, uintptr_t y,
                 const std::vector<std::array<uintptr_t, 3>>& filters) {
  std::vector<Conv2dArgs> args;
  for (const auto& [w, bias, packed] : filters) {
    args.push_back({nullptr, address<void>(w), address<void>(bias), nullptr, nullptr, address<void>(packed)});
  }
  if (args.empty()) throw std::invalid_argument("a cascade takes the operands of each of its convolutions");
  args.front().x = address<void>(x);
  args.back().residual = address<void>(residual);
  args.back().y = address<void>(y);
  const Scratch scratch(cascade.workspace());
  py::gil_scoped_release release;
  cascade.run(args, scratch.data());
}

void run_pool2d(const AnyPlan& plan, uintptr_t x, uintptr_t y, uintptr_t indices, std::optional<uintptr_t> workspace,
                uintptr_t stream) {
  run(plan, Pool2dArgs{address<void>(x), address<void>(y), address<int64_t>(indices)}, workspace, stream);
}

// In the order of SdpaArgs, 0 for what is absent.
void run_sdpa(const AnyPlan& plan, const std::array<uintptr_t, 15>& a, std::optional<uintptr_t> workspace, uintptr_t stream) {
  run(plan,
      SdpaArgs{address<void>(a[0]), address<void>(a[1]), address<void>(a[2]), address<void>(a[3]), address<void>(a[4]),
               address<void>(a[5]), address<void>(a[6]), address<void>(a[7]), address<void>(a[8]), address<void>(a[9]),
               address<void>(a[10]), address<void>(a[11]), address<void>(a[12]), address<void>(a[13]), address<void>(a[14])},
      workspace, stream);
}

// In the order of NormArgs, 0 for what is absent.
void run_norm(const AnyPlan& plan, const std::array<uintptr_t, 13>& a, std::optional<uintptr_t> workspace, uintptr_t stream) {
  run(plan,
      NormArgs{address<void>(a[0]), address<void>(a[1]), address<void>(a[2]), address<void>(a[3]), address<void>(a[4]),
               address<void>(a[5]), address<void>(a[6]), address<void>(a[7]), address<void>(a[8]), address<void>(a[9]),
               address<void>(a[10]), address<void>(a[11]), address<void>(a[12])},
      workspace, stream);
}

// In the order of BatchNormArgs, 0 for what is absent.
void run_batch_norm(const AnyPlan& plan, const std::array<uintptr_t, 12>& a, std::optional<uintptr_t> workspace,
                    uintptr_t stream) {
  run(plan,
      BatchNormArgs{address<void>(a[0]), address<void>(a[1]), address<void>(a[2]), address<void>(a[3]), address<void>(a[4]),
                    address<void>(a[5]), address<void>(a[6]), address<void>(a[7]), address<void>(a[8]), address<void>(a[9]),
                    address<void>(a[10]), address<void>(a[11])},
      workspace, stream);
}

// In the order of RecurrentArgs, 0 for what is absent.
void run_recurrent(const AnyPlan& plan, const std::array<uintptr_t, 14>& a, std::optional<uintptr_t> workspace,
                   uintptr_t stream) {
  run(plan,
      RecurrentArgs{address<void>(a[0]), address<void>(a[1]), address<void>(a[2]), address<void>(a[3]), address<void>(a[4]),
                    address<void>(a[5]), address<void>(a[6]), address<void>(a[7]), address<void>(a[8]), address<void>(a[9]),
                    address<void>(a[10]), address<void>(a[11]), address<void>(a[12]), address<void>(a[13])},
      workspace, stream);
}

template <class Problem>
py::list explain(const std::string& op, const Problem& problem, const std::string& force, bool strict, int device) {
  py::list table;
  for (const Candidate& candidate : candidates(op, problem, {force, strict, device})) {
    table.append(py::make_tuple(candidate.row->name, candidate.verdict, candidate.cost));
  }
  return table;
}

py::list kernels() {
  py::list list;
  for (const Row& row : rows()) list.append(py::cast(&row, py::return_value_policy::reference));
  return list;
}

// Whether a kernel runs here is asked when somebody wants to know: the answer about a GPU's starts the driver.
void bind_rows(py::module_& m) {
  py::class_<Row>(m, "KernelInfo")
      .def_readonly("name", &Row::name)
      .def_readonly("op", &Row::op)
      .def_readonly("algorithm", &Row::algorithm)
      .def_readonly("dtype", &Row::dtype)
      .def_readonly("target", &Row::target)
      .def_property_readonly(
          "error_growth",
          [](const Row& row) { return std::visit([](const auto* kernel) { return kernel->error_growth; }, row.kernel); })
      .def_property_readonly("why_not", [](const Row& row) { return why_not_runnable(row); })
      .def_property_readonly("runnable", [](const Row& row) { return why_not_runnable(row).empty(); })
      .def("__repr__", [](const Row& row) { return "<kernel " + row.name + ">"; });
  m.def("why_not_on_gpu", &why_not_on_gpu, py::arg("device"));
  m.def("why_not_capability", &why_not_capability, py::arg("major"), py::arg("minor"), py::arg("built"));
}

py::dict machine() {
  const MachineInfo& info = machine_info();
  using namespace py::literals;
  return py::dict("cpu"_a = info.cpu, "isa"_a = isa_names(info.machine.isa), "isa_found"_a = isa_names(info.isa_found),
                  "l1_bytes"_a = info.machine.l1_bytes, "l2_bytes"_a = info.machine.l2_bytes,
                  "l3_bytes"_a = info.machine.l3_bytes, "cores"_a = info.cores);
}

py::dict build() {
  using namespace py::literals;
  uint32_t built = kIsaScalar;
#ifdef FASTCONV_AVX2
  built |= kIsaAvx2;
#endif
#ifdef FASTCONV_AVX512
  built |= kIsaAvx512;
#endif
#ifdef FASTCONV_AVX512_BF16
  built |= kIsaAvx512Bf16;
#endif
#ifdef _OPENMP
  const std::string openmp = std::to_string(_OPENMP);
#else
  const std::string openmp;
#endif
  return py::dict("version"_a = FASTCONV_VERSION, "compiler"_a = FASTCONV_COMPILER, "flags"_a = FASTCONV_FLAGS,
                  "targets"_a = isa_names(built), "cuda"_a = FASTCONV_CUDA_VERSION, "cuda_reason"_a = FASTCONV_CUDA_REASON,
                  "cuda_architectures"_a = FASTCONV_CUDA_ARCHITECTURES, "openmp"_a = openmp);
}

void bind_problems(py::module_& m) {
  using namespace py::literals;
  py::class_<Conv2dProblem>(m, "Conv2dProblem")
      .def(py::init([](const std::string& dtype, int64_t N, int64_t C, int64_t H, int64_t W, int64_t K, int64_t R, int64_t S,
                       int64_t P, int64_t Q, int64_t groups, Pair stride, Pair pad, Pair dilation, Quad x, Quint w, Quad y,
                       bool bias, bool residual, const std::string& activation, bool frozen) {
             return Conv2dProblem{.dtype = parse_dtype(dtype),
                                  .N = N,
                                  .C = C,
                                  .H = H,
                                  .W = W,
                                  .K = K,
                                  .R = R,
                                  .S = S,
                                  .P = P,
                                  .Q = Q,
                                  .groups = groups,
                                  .stride_h = stride[0],
                                  .stride_w = stride[1],
                                  .pad_top = pad[0],
                                  .pad_left = pad[1],
                                  .dilation_h = dilation[0],
                                  .dilation_w = dilation[1],
                                  .x = stride4(x),
                                  .w = {w[0], w[1], w[2], w[3], w[4]},
                                  .y = stride4(y),
                                  .epilogue = {bias, residual, parse_activation(activation)},
                                  .frozen = frozen};
           }),
           py::kw_only(), "dtype"_a, "N"_a, "C"_a, "H"_a, "W"_a, "K"_a, "R"_a, "S"_a, "P"_a, "Q"_a, "groups"_a, "stride"_a,
           "pad"_a, "dilation"_a, "x"_a, "w"_a, "y"_a, "bias"_a = false, "residual"_a = false, "activation"_a = "none",
           "frozen"_a = false);
  py::class_<Pool2dProblem>(m, "Pool2dProblem")
      .def(py::init([](const std::string& dtype, int64_t N, int64_t C, int64_t H, int64_t W, int64_t P, int64_t Q, int64_t R,
                       int64_t S, Pair stride, Quad pad, Pair dilation, Quad x, Quad y, int64_t divisor_override,
                       bool count_include_pad, bool adaptive) {
             return Pool2dProblem{.dtype = parse_dtype(dtype),
                                  .N = N,
                                  .C = C,
                                  .H = H,
                                  .W = W,
                                  .P = P,
                                  .Q = Q,
                                  .R = R,
                                  .S = S,
                                  .stride_h = stride[0],
                                  .stride_w = stride[1],
                                  .pad_top = pad[0],
                                  .pad_bottom = pad[1],
                                  .pad_left = pad[2],
                                  .pad_right = pad[3],
                                  .dilation_h = dilation[0],
                                  .dilation_w = dilation[1],
                                  .divisor_override = divisor_override,
                                  .count_include_pad = count_include_pad,
                                  .adaptive = adaptive,
                                  .x = stride4(x),
                                  .y = stride4(y)};
           }),
           py::kw_only(), "dtype"_a, "N"_a, "C"_a, "H"_a, "W"_a, "P"_a, "Q"_a, "R"_a, "S"_a, "stride"_a, "pad"_a, "dilation"_a,
           "x"_a, "y"_a, "divisor_override"_a = 0, "count_include_pad"_a = true, "adaptive"_a = false);
  py::class_<SdpaProblem>(m, "SdpaProblem")
      .def(py::init([](const std::string& dtype, int64_t B, int64_t Hq, int64_t Hkv, int64_t Lq, int64_t Lkv, int64_t D,
                       int64_t Dv, double scale, double softcap, const std::string& mask_kind, Pair band, double dropout,
                       int64_t key, const std::array<Quad, 5>& strides, const std::array<Quad, 4>& gradient_strides,
                       std::optional<std::array<int64_t, 3>> bias) {
             if (Hkv <= 0 || Hq % Hkv != 0) throw std::invalid_argument("Hkv must divide Hq");
             return SdpaProblem{.dtype = parse_dtype(dtype),
                                .B = B,
                                .Hq = Hq,
                                .Hkv = Hkv,
                                .Lq = Lq,
                                .Lkv = Lkv,
                                .D = D,
                                .Dv = Dv,
                                .scale = scale,
                                .softcap = softcap,
                                .mask_kind = parse_mask(mask_kind),
                                .bias = bias ? RelativeBias{true, (*bias)[0], (*bias)[1], (*bias)[2]} : RelativeBias{},
                                .band = {band[0], band[1]},
                                .dropout = {dropout, key},
                                .q = sdpa_stride(strides[0]),
                                .k = sdpa_stride(strides[1]),
                                .v = sdpa_stride(strides[2]),
                                .out = sdpa_stride(strides[3]),
                                .mask = sdpa_stride(strides[4]),
                                .dout = sdpa_stride(gradient_strides[0]),
                                .dq = sdpa_stride(gradient_strides[1]),
                                .dk = sdpa_stride(gradient_strides[2]),
                                .dv = sdpa_stride(gradient_strides[3])};
           }),
           py::kw_only(), "dtype"_a, "B"_a, "Hq"_a, "Hkv"_a, "Lq"_a, "Lkv"_a, "D"_a, "Dv"_a, "scale"_a, "softcap"_a = 0.0,
           "mask_kind"_a = "none", "band"_a, "dropout"_a = 0.0, "key"_a = 0, "strides"_a,
           "gradient_strides"_a = std::array<Quad, 4>{}, "bias"_a = py::none());
  py::class_<NormProblem>(m, "NormProblem")
      .def(py::init([](const std::string& dtype, int64_t N, int64_t C, double eps) {
             return NormProblem{.dtype = parse_dtype(dtype), .N = N, .C = C, .eps = eps};
           }),
           py::kw_only(), "dtype"_a, "N"_a, "C"_a, "eps"_a);
  py::class_<BatchNormProblem>(m, "BatchNormProblem")
      .def(py::init([](const std::string& dtype, int64_t N, int64_t C, int64_t P, bool channels_last, bool training,
                       bool residual, const std::string& activation, double eps) {
             return BatchNormProblem{.dtype = parse_dtype(dtype),
                                     .N = N,
                                     .C = C,
                                     .P = P,
                                     .channels_last = channels_last,
                                     .training = training,
                                     .residual = residual,
                                     .activation = parse_activation(activation),
                                     .eps = eps};
           }),
           py::kw_only(), "dtype"_a, "N"_a, "C"_a, "P"_a, "channels_last"_a, "training"_a, "residual"_a, "activation"_a, "eps"_a);
  py::class_<RecurrentProblem>(m, "RecurrentProblem")
      .def(py::init([](const std::string& dtype, int64_t L, int64_t B, int64_t H, bool reverse) {
             return RecurrentProblem{.dtype = parse_dtype(dtype), .L = L, .B = B, .H = H, .reverse = reverse};
           }),
           py::kw_only(), "dtype"_a, "L"_a, "B"_a, "H"_a, "reverse"_a);
}

template <class Problem>
void bind_selection(py::module_& m) {
  using namespace py::literals;
  m.def(
      "plan",
      [](const std::string& op, const Problem& problem, int threads, const std::string& force, bool strict, int device) {
        return AnyPlan(choose(op, problem, threads, {force, strict, device}));
      },
      "op"_a, "problem"_a, "threads"_a, "force"_a = "", "strict"_a = false, "device"_a = int(kCpu));
  m.def("explain", &explain<Problem>, "op"_a, "problem"_a, "force"_a = "", "strict"_a = false, "device"_a = int(kCpu));
}

PYBIND11_MODULE(_C, m) {
  using namespace py::literals;
  py::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const NoKernel& e) {
      PyErr_SetString(PyExc_NotImplementedError, e.what());
    }
  });
  watch_forks();
  keep_freed_memory();
  bind_rows(m);
  bind_problems(m);
  bind_selection<Conv2dProblem>(m);
  bind_selection<Pool2dProblem>(m);
  bind_selection<SdpaProblem>(m);
  bind_selection<NormProblem>(m);
  bind_selection<BatchNormProblem>(m);
  bind_selection<RecurrentProblem>(m);
  py::class_<AnyPlan>(m, "Plan")
      .def_property_readonly("kernel", &AnyPlan::kernel)
      .def_property_readonly("workspace", &AnyPlan::workspace)
      .def_property_readonly("threads", &AnyPlan::threads)
      .def("run_conv2d", &run_conv2d, "x"_a, "w"_a, "bias"_a, "residual"_a, "y"_a, "packed"_a = 0, "workspace"_a = py::none(),
           "stream"_a = 0)
      .def_property_readonly("packed",
                             [](const AnyPlan& plan) { return std::pair(plan.packed().bytes, plan.packed().arrangement); })
      .def(
          "pack", [](const AnyPlan& plan, uintptr_t w, uintptr_t packed) { plan.pack(address<void>(w), address<void>(packed)); },
          py::call_guard<py::gil_scoped_release>(), "w"_a, "packed"_a)
      .def("run_pool2d", &run_pool2d, "x"_a, "y"_a, "indices"_a, "workspace"_a = py::none(), "stream"_a = 0)
      .def("run_sdpa", &run_sdpa, "addresses"_a, "workspace"_a = py::none(), "stream"_a = 0)
      .def("run_norm", &run_norm, "addresses"_a, "workspace"_a = py::none(), "stream"_a = 0)
      .def("run_batch_norm", &run_batch_norm, "addresses"_a, "workspace"_a = py::none(), "stream"_a = 0)
      .def("run_recurrent", &run_recurrent, "addresses"_a, "workspace"_a = py::none(), "stream"_a = 0);
  py::class_<Cascade>(m, "Cascade")
      .def(py::init(&cascade_of), "plans"_a)
      .def_property_readonly("rows", &Cascade::rows)
      .def_property_readonly("workspace", &Cascade::workspace)
      .def("run", &run_cascade, "x"_a, "residual"_a, "y"_a, "filters"_a);
  if (!add_eager_calls(m.ptr())) throw py::error_already_set();
  m.def("kernels", &kernels);
  m.def("machine", &machine);
  m.def("build", &build);
  // The address of this thread's scratch, for tests: good until the next call on the thread, and no longer at all beyond what
  // a thread keeps.
  m.def("scratch", [](int64_t bytes) { return reinterpret_cast<uintptr_t>(Scratch(bytes).data()); }, "bytes"_a);
  m.def("set_isa_limit", &set_isa_limit, "name"_a);
  m.def("fma_peak", &fma_peak, "target"_a, "dtype"_a, "threads"_a, "seconds"_a, py::call_guard<py::gil_scoped_release>());
}

}  // namespace
}  // namespace fastconv

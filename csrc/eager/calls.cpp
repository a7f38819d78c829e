#include "eager/calls.h"

#include <string>

#include "eager/call.h"
#include "eager/frozen.h"
#include "eager/gradients.h"

namespace fastconv {
namespace {

constexpr const char* kNames[kOps] = {"conv2d",
                                      "linear",
                                      "max_pool2d",
                                      "avg_pool2d",
                                      "adaptive_avg_pool2d",
                                      "layer_norm",
                                      "sdpa",
                                      "frozen_conv2d",
                                      "frozen_linear",
                                      "conv2d_dgrad",
                                      "conv2d_wgrad",
                                      "linear_dgrad",
                                      "linear_wgrad",
                                      "max_pool2d_bwd",
                                      "avg_pool2d_bwd",
                                      "adaptive_avg_pool2d_bwd"};

using Address = void*;

PyObject* answer(Op op, Call& call, PyObject* const* args) {
  PyObject* found = call.recipe();
  if (!found || found == Py_None) return found;
  const auto& recipe = *reinterpret_cast<Recipe*>(found);
  PyObject* y = nullptr;
  if (call.derives()) {
    PyObject* recorder = registered[op].takes_over;
    PyObject* all[4];
    for (int i = 0; i < call.tensors(); ++i) all[i] = args[i];
    all[call.tensors()] = found;
    y = recorder == Py_None ? none() : PyObject_Vectorcall(recorder, all, size_t(call.tensors()) + 1, nullptr);
  } else {
    Address address;
    y = allocate(call.torch(), recipe.shape, recipe.strides, call.torch().dtype(call.operand(0).dtype), &address);
    Address x = call.operand(0).data;
    if (y && !(op == kConv2d || op == kLinear
                   ? run(recipe, Conv2dArgs{x, call.operand(1).data, call.operand(2).data, nullptr, address})
                   : run(recipe, Pool2dArgs{x, address, nullptr}))) {
      Py_CLEAR(y);
    }
  }
  Py_DECREF(found);
  return y;
}

PyObject* conv2d(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Call call(kConv2d, args, count);
  const bool ours = call.begin(7) && call.tensor(0) && call.tensor(1) && call.optional_tensor(2) && call.pair(3) &&
                    call.pair(4) && call.pair(5) && call.integer(6);
  return ours ? answer(kConv2d, call, args) : call.pass();
}

PyObject* linear(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Call call(kLinear, args, count);
  const bool ours = call.begin(3) && call.tensor(0) && call.tensor(1) && call.optional_tensor(2);
  return ours ? answer(kLinear, call, args) : call.pass();
}

PyObject* max_pool2d(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Call call(kMaxPool2d, args, count);
  const bool ours = call.begin(6) && call.tensor(0) && call.pair(1) && call.pair(args[2] == Py_None ? 1 : 2) && call.pair(3) &&
                    call.pair(4) && call.flag(5);
  return ours ? answer(kMaxPool2d, call, args) : call.pass();
}

PyObject* avg_pool2d(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Call call(kAvgPool2d, args, count);
  const bool ours = call.begin(6) && call.tensor(0) && call.pair(1) && call.pair(args[2] == Py_None ? 1 : 2) && call.pair(3) &&
                    call.flag(4) && call.flag(5);
  return ours ? answer(kAvgPool2d, call, args) : call.pass();
}

PyObject* adaptive_avg_pool2d(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Call call(kAdaptiveAvgPool2d, args, count);
  const bool ours = call.begin(2) && call.tensor(0) && call.pair(1);
  return ours ? answer(kAdaptiveAvgPool2d, call, args) : call.pass();
}

// (input, normalized_shape, weight, bias, eps, residual) -> y, or y and the sum where there is a residual. Where a gradient is
// wanted the call is Python's, which keeps what the backward pass needs.
PyObject* layer_norm(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Call call(kLayerNorm, args, count);
  const bool ours = call.begin(6) && call.tensor(0) && call.optional_tensor(2) && call.optional_tensor(3) &&
                    call.optional_tensor(5) && !call.derives() && call.sizes(1) && call.number(4);
  if (!ours) return call.pass();
  PyObject* found = call.recipe();
  if (!found || found == Py_None) return found;
  const auto& recipe = *reinterpret_cast<Recipe*>(found);
  NormArgs given{};
  given.x = call.operand(0).data;
  given.gamma = call.operand(1).data;
  given.beta = call.operand(2).data;
  given.residual = call.operand(3).data;
  PyObject* dtype = call.torch().dtype(call.operand(0).dtype);
  PyObject* y = allocate(call.torch(), recipe.shape, recipe.strides, dtype, &given.y);
  PyObject* sum = y && given.residual ? allocate(call.torch(), recipe.shape, recipe.strides, dtype, &given.sum) : nullptr;
  PyObject* result = nullptr;
  if (y && (sum || !given.residual) && run(recipe, given)) {
    result = sum ? PyTuple_Pack(2, y, sum) : y;
    if (!sum) Py_INCREF(y);
  }
  Py_XDECREF(y);
  Py_XDECREF(sum);
  Py_DECREF(found);
  return result;
}

// (query, key, value, is_causal, scale, enable_gqa) -> the output. Masks, dropout, gradients and what torch has not are Python's.
PyObject* sdpa(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Call call(kSdpa, args, count);
  const bool ours = call.begin(6) && call.tensor(0) && call.tensor(1) && call.tensor(2) && !call.derives() && call.flag(3) &&
                    call.optional_number(4) && call.flag(5);
  if (!ours) return call.pass();
  PyObject* found = call.recipe();
  if (!found || found == Py_None) return found;
  const auto& recipe = *reinterpret_cast<Recipe*>(found);
  SdpaArgs given{};
  given.q = call.operand(0).data;
  given.k = call.operand(1).data;
  given.v = call.operand(2).data;
  PyObject* out = allocate(call.torch(), recipe.shape, recipe.strides, call.torch().dtype(call.operand(0).dtype), &given.out);
  if (out && !run(recipe, given)) Py_CLEAR(out);
  Py_DECREF(found);
  return out;
}

// ---- Set-up ---------------------------------------------------------------------------------------------------------------

PyObject* connect(PyObject*, PyObject* args) {
  PyObject *needs, *exchange_api;
  if (!PyArg_ParseTuple(args, "OO", &needs, &exchange_api)) return nullptr;
  return Torch::connect(needs, exchange_api) ? none() : nullptr;
}

PyObject* register_op(PyObject*, PyObject* args) {
  PyObject *resolver, *takes_over;
  const char* name;
  if (!PyArg_ParseTuple(args, "sOO", &name, &resolver, &takes_over)) return nullptr;
  for (int op = 0; op < kOps; ++op) {
    if (std::string(name) != kNames[op]) continue;
    Py_INCREF(resolver);
    Py_INCREF(takes_over);
    Py_XSETREF(registered[op].resolver, resolver);
    Py_XSETREF(registered[op].takes_over, takes_over);
    return none();
  }
  PyErr_Format(PyExc_ValueError, "eager_register: no call is named '%s'", name);
  return nullptr;
}

PyObject* clear(PyObject*, PyObject*) {
  recipes::clear();
  return none();
}

using Fast = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);

PyMethodDef fast(const char* name, Fast function) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function)), METH_FASTCALL, nullptr};
}

// Python keeps pointers to these.
PyMethodDef methods[] = {
    fast("eager_conv2d", &conv2d),
    fast("eager_linear", &linear),
    fast("eager_max_pool2d", &max_pool2d),
    fast("eager_avg_pool2d", &avg_pool2d),
    fast("eager_adaptive_avg_pool2d", &adaptive_avg_pool2d),
    fast("eager_layer_norm", &layer_norm),
    fast("eager_sdpa", &sdpa),
    fast("eager_frozen_conv2d", &frozen_conv2d),
    fast("eager_frozen_linear", &frozen_linear),
    fast("eager_record_product", &record_product),
    fast("eager_record_max", &record_max),
    fast("eager_record_avg", &record_avg),
    fast("eager_backward_conv2d", &backward_conv2d),
    fast("eager_backward_linear", &backward_linear),
    fast("eager_backward_max_pool2d", &backward_max_pool2d),
    fast("eager_backward_avg_pool2d", &backward_avg_pool2d),
    fast("eager_backward_adaptive_avg_pool2d", &backward_adaptive_avg_pool2d),
    {"eager_connect", &connect, METH_VARARGS, nullptr},
    {"eager_register", &register_op, METH_VARARGS, nullptr},
    {"eager_clear", &clear, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

bool add_eager_calls(PyObject* module) {
  return prepare_recipes() && prepare_frozen() && prepare_gradients() && PyModule_AddFunctions(module, methods) == 0;
}

}  // namespace fastconv

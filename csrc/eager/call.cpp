#include "eager/call.h"

#include <pybind11/pybind11.h>

#include <bit>
#include <cstring>
#include <limits>
#include <new>

#include "eager/scratch.h"

namespace py = pybind11;

namespace fastconv {
namespace {

template <class Args>
bool run_any(const Recipe& recipe, const Args& args) {
  try {
    const Scratch scratch(recipe.plan->workspace());
    PyThreadState* state = recipe.brief ? nullptr : PyEval_SaveThread();
    recipe.plan->run(args, scratch.data());
    if (state) PyEval_RestoreThread(state);
    return true;
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
    return false;
  }
}

// Whose kernels take operands that are stored as halves.
bool takes_halves(Op op) {
  return op == kSdpa || op == kLinear || op == kFrozenLinear || op == kLinearDgrad || op == kLinearWgrad;
}

}  // namespace

Registered registered[kOps];

PyObject* none() { Py_RETURN_NONE; }

bool run(const Recipe& recipe, const Conv2dArgs& args) { return run_any(recipe, args); }
bool run(const Recipe& recipe, const Pool2dArgs& args) { return run_any(recipe, args); }
bool run(const Recipe& recipe, const NormArgs& args) { return run_any(recipe, args); }
bool run(const Recipe& recipe, const SdpaArgs& args) { return run_any(recipe, args); }

PyObject* allocate(const Torch& torch, PyObject* shape, PyObject* strides, PyObject* dtype, void** address) {
  PyObject* tensor = torch.empty(shape, strides, dtype);
  Operand operand;
  if (!tensor || torch.read_own(tensor, &operand)) {
    if (tensor) *address = operand.data;
    return tensor;
  }
  Py_DECREF(tensor);
  return nullptr;
}

bool Call::begin(Py_ssize_t expected) {
  if (!torch_ || count_ != expected || !registered[op_].resolver) return false;
  moment_ = torch_->moment();
  if (moment_ != Moment::plain && moment_ != Moment::records) return false;
  const long threads = torch_->threads();
  return threads > 0 && key_.append(op_ | int64_t(torch_->strict()) << 8 | int64_t(threads) << 16);
}

bool Call::tensor(int at) {
  Operand& operand = operands_[tensors_++];
  if (!torch_->read(args_[at], &operand) || operand.dtype != operands_[0].dtype) return false;
  if ((operand.dtype == Dtype::bf16 || operand.dtype == Dtype::f16) && !takes_halves(op_)) return false;
  if (moment_ == Moment::records && torch_->requires_grad(args_[at])) derives_ = true;
  return key_.append(int64_t(operand.dtype) << 8 | operand.ndim) && key_.append(operand.shape, operand.ndim) &&
         key_.append(operand.strides, operand.ndim);
}

bool Call::optional_tensor(int at) {
  if (args_[at] != Py_None) return tensor(at);
  operands_[tensors_++] = {};
  return key_.append(-1);
}

// By type: a key cannot tell 1 from 1.0 and True, and torch does.
bool Call::integer(PyObject* value) {
  if (!PyLong_CheckExact(value)) return false;
  int overflow;
  const long long number = PyLong_AsLongLongAndOverflow(value, &overflow);
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  return !overflow && -kMax <= number && number <= kMax && key_.append(number);
}

bool Call::pair(int at) {
  PyObject* value = args_[at];
  if (!PyTuple_CheckExact(value)) return integer(value) && integer(value);
  return PyTuple_GET_SIZE(value) == 2 && integer(PyTuple_GET_ITEM(value, 0)) && integer(PyTuple_GET_ITEM(value, 1));
}

bool Call::sizes(int at) {
  PyObject* value = args_[at];
  if (!PyTuple_Check(value) || !key_.append(PyTuple_GET_SIZE(value))) return false;  // torch.Size is one
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(value); ++i) {
    if (!integer(PyTuple_GET_ITEM(value, i))) return false;
  }
  return true;
}

bool Call::number(int at) {
  return PyFloat_CheckExact(args_[at]) && key_.append(std::bit_cast<int64_t>(PyFloat_AS_DOUBLE(args_[at])));
}

bool Call::flag(int at) { return PyBool_Check(args_[at]) && key_.append(args_[at] == Py_True); }

bool Call::name(int at) {
  Py_ssize_t length = 0;
  const char* text = PyUnicode_CheckExact(args_[at]) ? PyUnicode_AsUTF8AndSize(args_[at], &length) : nullptr;
  int64_t words[2] = {};
  if (!text || length > Py_ssize_t(sizeof words)) return false;
  std::memcpy(words, text, size_t(length));
  return key_.append(words, 2);
}

PyObject* Call::pass() const { return PyErr_Occurred() ? nullptr : none(); }

PyObject* Call::recipe() {
  if (PyObject* found = recipes::find(key_)) {
    // A reference of one's own: while the kernel runs without the GIL the table may be cleared.
    Py_INCREF(found);
    return found;
  }
  PyObject* made = resolve();
  if (made) recipes::insert(key_, made);
  return made;
}

PyObject* Call::resolve() const {
  PyObject* answer = PyObject_Vectorcall(registered[op_].resolver, args_, size_t(count_), nullptr);
  if (!answer || answer == Py_None) return answer;
  try {
    const auto parts = py::reinterpret_steal<py::object>(answer).cast<py::tuple>();
    return new_recipe(parts[0].cast<const AnyPlan&>(), py::object(parts[py::slice(1, std::nullopt, std::nullopt)]).ptr());
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_TypeError, error.what());
  }
  return nullptr;
}

}  // namespace fastconv

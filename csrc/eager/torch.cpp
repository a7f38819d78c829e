#include "eager/torch.h"

#include <algorithm>
#include <memory>

namespace fastconv {
namespace {

Torch* connected = nullptr;  // never freed: its objects live as long as the interpreter

PyObject *current_level_name, *profiling_name, *strict_name;

// False for what is no number of ours.
bool find_dtype(const dlpack::DataType& type, Dtype* out) {
  if (type.lanes != 1) return false;
  if (type.code == dlpack::kBfloat) return *out = Dtype::bf16, type.bits == 16;
  *out = type.bits == 16 ? Dtype::f16 : type.bits == 32 ? Dtype::f32 : Dtype::f64;
  return type.code == dlpack::kFloat && (type.bits == 16 || type.bits == 32 || type.bits == 64);
}

// A new reference, kept for ever.
bool take(PyObject* needs, const char* name, PyObject** out) {
  *out = PyObject_GetAttrString(needs, name);
  return *out != nullptr;
}

}  // namespace

bool Torch::connect(PyObject* needs, PyObject* exchange_api) {
  std::unique_ptr<Torch> t(new Torch);
  if (!take(needs, "tensor", &t->tensor_) || !take(needs, "parameter", &t->parameter_) ||
      !take(needs, "watchers", &t->watchers_) || !take(needs, "forward_ad", &t->forward_ad_) ||
      !take(needs, "profiler", &t->profiler_) || !take(needs, "grad_enabled", &t->grad_enabled_) ||
      !take(needs, "get_threads", &t->get_threads_) || !take(needs, "empty_strided", &t->empty_strided_) ||
      !take(needs, "is_neg", &t->is_neg_) || !take(needs, "requires_grad", &t->requires_grad_) ||
      !take(needs, "float32", &t->dtypes_[int(Dtype::f32)]) || !take(needs, "float64", &t->dtypes_[int(Dtype::f64)]) ||
      !take(needs, "bfloat16", &t->dtypes_[int(Dtype::bf16)]) || !take(needs, "float16", &t->dtypes_[int(Dtype::f16)]) ||
      !take(needs, "int64", &t->int64_) || !take(needs, "planning", &t->planning_) || !take(needs, "observers", &t->observers_) ||
      !take(needs, "forced", &t->forced_) || !take(needs, "default_forced", &t->default_forced_)) {
    return false;
  }
  const auto* api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(exchange_api, dlpack::kCapsuleName));
  if (!api) return false;
  while (api && api->version.major != dlpack::kMajor) api = api->older;
  if (!api || !api->tensor_from_object) {
    PyErr_SetString(PyExc_NotImplementedError, "this torch offers no DLPack exchange of version 1");
    return false;
  }
  if (!PyTuple_Check(t->watchers_) || !PyDict_Check(t->forward_ad_) || !PyDict_Check(t->profiler_) ||
      !PyDict_Check(t->planning_) || !PyList_Check(t->observers_) || !Py_TYPE(t->requires_grad_)->tp_descr_get) {
    PyErr_SetString(PyExc_TypeError, "eager_connect: watchers, forward_ad, plan, observers or requires_grad has the wrong type");
    return false;
  }
  t->tensor_from_object_ = api->tensor_from_object;
  current_level_name = PyUnicode_InternFromString("_current_level");
  profiling_name = PyUnicode_InternFromString("_is_profiler_enabled");
  strict_name = PyUnicode_InternFromString("strict");
  connected = t.release();
  return true;
}

const Torch* Torch::get() { return connected; }

Moment Torch::moment() const {
  if (PyList_GET_SIZE(observers_)) return Moment::other;
  PyObject* forced = nullptr;
  if (PyContextVar_Get(forced_, nullptr, &forced) < 0) return Moment::error;
  Py_XDECREF(forced);
  if (forced != default_forced_) return Moment::other;
  PyObject* level = PyDict_GetItemWithError(forward_ad_, current_level_name);
  if (!level) return PyErr_Occurred() ? Moment::error : Moment::other;
  if (PyLong_AsLong(level) >= 0) return Moment::other;
  if (PyDict_GetItemWithError(profiler_, profiling_name) != Py_False) return PyErr_Occurred() ? Moment::error : Moment::other;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(watchers_); ++i) {
    PyObject* answer = PyObject_Vectorcall(PyTuple_GET_ITEM(watchers_, i), nullptr, 0, nullptr);
    if (!answer) return Moment::error;
    const int watching = PyObject_IsTrue(answer);
    Py_DECREF(answer);
    if (watching) return watching < 0 ? Moment::error : Moment::other;
  }
  PyObject* grad = PyObject_Vectorcall(grad_enabled_, nullptr, 0, nullptr);
  if (!grad) return Moment::error;
  Py_DECREF(grad);
  return grad == Py_True ? Moment::records : Moment::plain;
}

bool Torch::read(PyObject* object, Operand* out) const {
  if (Py_TYPE(object) != reinterpret_cast<PyTypeObject*>(tensor_) &&
      Py_TYPE(object) != reinterpret_cast<PyTypeObject*>(parameter_)) {
    return false;
  }
  dlpack::Tensor t;
  if (tensor_from_object_(object, &t) != 0) {
    PyErr_Clear();  // no address: sparse, nested, meta, a wrapper of vmap; torch says so, and the caller goes another way
    return false;
  }
  // A ZeroTensor has sizes and no memory.
  Dtype dtype;
  if (!t.data || t.device.type != dlpack::kCpu || !find_dtype(t.dtype, &dtype)) return false;
  PyObject* negative = PyObject_Vectorcall(is_neg_, &object, 1, nullptr);
  if (negative != Py_False) {
    if (!negative) PyErr_Clear();
    Py_XDECREF(negative);
    return false;
  }
  Py_DECREF(negative);
  *out = {static_cast<char*>(t.data) + t.byte_offset, t.shape, t.strides, t.ndim, dtype};
  return true;
}

bool Torch::read_own(PyObject* tensor, Operand* out) const {
  dlpack::Tensor t;
  if (tensor_from_object_(tensor, &t) != 0) return false;
  Dtype dtype{};
  find_dtype(t.dtype, &dtype);  // packed weights are bytes, and nobody asks what of
  *out = {static_cast<char*>(t.data) + t.byte_offset, t.shape, t.strides, t.ndim, dtype};
  return true;
}

int64_t* Torch::read_indices(PyObject* object, const Operand& like) const {
  dlpack::Tensor t;
  if (Py_TYPE(object) != reinterpret_cast<PyTypeObject*>(tensor_)) return nullptr;
  if (tensor_from_object_(object, &t) != 0) {
    PyErr_Clear();
    return nullptr;
  }
  const bool fits = t.device.type == dlpack::kCpu && t.dtype.code == dlpack::kInt && t.dtype.bits == 64 && t.ndim == like.ndim &&
                    std::equal(t.shape, t.shape + t.ndim, like.shape) && std::equal(t.strides, t.strides + t.ndim, like.strides);
  return fits ? reinterpret_cast<int64_t*>(static_cast<char*>(t.data) + t.byte_offset) : nullptr;
}

bool Torch::requires_grad(PyObject* tensor) const {
  PyObject* answer = Py_TYPE(requires_grad_)->tp_descr_get(requires_grad_, tensor, reinterpret_cast<PyObject*>(Py_TYPE(tensor)));
  Py_XDECREF(answer);
  return answer == Py_True;
}

long Torch::threads() const {
  PyObject* count = PyObject_Vectorcall(get_threads_, nullptr, 0, nullptr);
  if (!count) return -1;
  const long threads = PyLong_AsLong(count);
  Py_DECREF(count);
  return threads;
}

bool Torch::strict() const { return PyDict_GetItemWithError(planning_, strict_name) != Py_False; }

PyObject* Torch::empty(PyObject* shape, PyObject* strides, PyObject* dtype) const {
  PyObject* const args[] = {shape, strides, dtype};
  return PyObject_Vectorcall(empty_strided_, args, 3, nullptr);
}

}  // namespace fastconv

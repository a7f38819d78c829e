// What a call on torch's tensors needs of torch, handed over once by Python (python/fastconv/ops/_eager.py). Nothing is linked:
// functions of torch arrive as Python objects, tensors are read through DLPack.
#pragma once

#include <Python.h>

#include "core/problem.h"
#include "eager/dlpack.h"

namespace fastconv {

struct Operand {
  void* data;
  const int64_t *shape, *strides;
  int32_t ndim;
  Dtype dtype;
};

enum class Moment { plain, records, other, error };

class Torch {
 public:
  // From an object with the attributes of ops/_eager.py's `Needs`, and torch.Tensor.__dlpack_c_exchange_api__. False, with a
  // Python exception set, where something is missing.
  static bool connect(PyObject* needs, PyObject* exchange_api);
  // Null before that.
  static const Torch* get();

  // Whether the calls made now are nobody's business but ours (and autograd's, where it records): no transform, mode, tracer,
  // autocast, profiler, observer or forced kernel.
  Moment moment() const;
  // Sizes, strides and address of a dense float CPU tensor whose values are what its memory holds; false for any other object.
  bool read(PyObject* object, Operand* out) const;
  // The same without the checks, for a tensor just made. False with a Python exception set.
  bool read_own(PyObject* tensor, Operand* out) const;
  // The address of an int64 CPU tensor with the sizes and strides of another; null for any other object.
  int64_t* read_indices(PyObject* object, const Operand& like) const;
  bool requires_grad(PyObject* tensor) const;  // false too, with an exception set, where that cannot be told
  long threads() const;                        // -1 with an exception set
  bool strict() const;

  PyObject* empty(PyObject* shape, PyObject* strides, PyObject* dtype) const;  // a new tensor, or null with an exception set
  PyObject* dtype(Dtype dtype) const { return dtypes_[int(dtype)]; }
  PyObject* int64() const { return int64_; }

 private:
  Torch() = default;

  int (*tensor_from_object_)(void*, dlpack::Tensor*) = nullptr;
  PyObject *tensor_, *parameter_;  // the two types without a __torch_function__ or __torch_dispatch__ of their own
  PyObject* watchers_;             // tuple of callables without arguments that return something false in a plain moment
  PyObject* forward_ad_;           // torch.autograd.forward_ad's dict, whose _current_level is negative outside of it
  PyObject* profiler_;             // torch.autograd.profiler's dict, whose _is_profiler_enabled is False outside of it
  PyObject *grad_enabled_, *get_threads_, *empty_strided_, *is_neg_, *requires_grad_;
  PyObject *dtypes_[4], *int64_;                                 // by Dtype
  PyObject *planning_, *observers_, *forced_, *default_forced_;  // fastconv.plan's dict and three of its values
};

}  // namespace fastconv

// One call on its way from Python's arguments to a recipe and its result.
#pragma once

#include <Python.h>

#include "eager/recipe.h"
#include "eager/torch.h"

namespace fastconv {

enum Op {
  kConv2d,
  kLinear,
  kMaxPool2d,
  kAvgPool2d,
  kAdaptiveAvgPool2d,
  kLayerNorm,
  kSdpa,
  kFrozenConv2d,
  kFrozenLinear,
  kConv2dDgrad,
  kConv2dWgrad,
  kLinearDgrad,
  kLinearWgrad,
  kMaxPool2dBwd,
  kAvgPool2dBwd,
  kAdaptiveAvgPool2dBwd,
  kOps
};

// By op, what Python registered. A resolver takes the arguments of the call and answers (plan, shape, strides, info), or None
// where the call is Python's. Who takes over: for a forward op, the autograd.Function's apply where a gradient is wanted, called
// with the operands and the recipe; for a gradient, Python's backward pass, called with (context, dy, saved tensors); for an op
// on frozen weights, who packs them, called with (kept, weight, recipe).
struct Registered {
  PyObject *resolver, *takes_over;
};
extern Registered registered[kOps];

// A new reference to None.
PyObject* none();

// Each step is false where the call is not ours; then pass() is the answer. Operands are borrowed from the caller.
class Call {
 public:
  // `args`: what the resolver gets.
  Call(Op op, PyObject* const* args, Py_ssize_t count) : op_(op), args_(args), count_(count), torch_(Torch::get()) {}

  // Whether this is a moment for it. `expected`: the number of arguments.
  bool begin(Py_ssize_t expected);

  bool tensor(int at);
  bool optional_tensor(int at);
  bool pair(int at);
  bool sizes(int at);   // a tuple of ints
  bool number(int at);  // a float
  bool optional_number(int at) { return args_[at] == Py_None ? key_.append(-1) : number(at); }
  bool integer(int at) { return integer(args_[at]); }
  bool flag(int at);
  bool name(int at);  // a string of at most 16 bytes
  bool serial(const Recipe& forward) { return key_.append(forward.serial); }

  // The recipe of the call: a new reference, or None where there is none, or null with a Python exception set.
  PyObject* recipe();

  // None, or null where a step failed with a Python exception.
  PyObject* pass() const;

  bool derives() const { return derives_; }
  bool recording() const { return moment_ == Moment::records; }
  const Torch& torch() const { return *torch_; }
  const Operand& operand(int i) const { return operands_[i]; }
  int tensors() const { return tensors_; }

 private:
  bool integer(PyObject* value);
  PyObject* resolve() const;

  Op op_;
  PyObject* const* args_;
  Py_ssize_t count_;
  const Torch* torch_;
  Moment moment_ = Moment::other;
  bool derives_ = false;
  int tensors_ = 0;
  Operand operands_[4] = {};
  Key key_;
};

// Runs a recipe's plan on scratch of this thread, without the GIL if it takes long. False with a Python exception set.
bool run(const Recipe& recipe, const Conv2dArgs& args);
bool run(const Recipe& recipe, const Pool2dArgs& args);
bool run(const Recipe& recipe, const NormArgs& args);
bool run(const Recipe& recipe, const SdpaArgs& args);

// A tensor to be written, of the recipe's shape unless another is given, and its address. Null with a Python exception set.
PyObject* allocate(const Torch& torch, PyObject* shape, PyObject* strides, PyObject* dtype, void** address);

}  // namespace fastconv

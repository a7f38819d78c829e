#include "eager/gradients.h"

#include "eager/call.h"

namespace fastconv {
namespace {

PyObject *to_save_name, *materialize_name, *recipe_name, *needs_name, *saved_name;

// A reference that is given up at the end of the block.
class Held {
 public:
  explicit Held(PyObject* object) : object_(object) {}
  ~Held() { Py_XDECREF(object_); }
  Held(const Held&) = delete;
  Held& operator=(const Held&) = delete;

  PyObject* get() const { return object_; }
  PyObject* release() {
    PyObject* object = object_;
    object_ = nullptr;
    return object;
  }
  explicit operator bool() const { return object_ != nullptr; }

 private:
  PyObject* object_;
};

// What Function.save_for_backward and set_materialize_grads do, and the recipe for the backward pass. Steals `saved`.
bool remember(PyObject* context, PyObject* saved, PyObject* recipe) {
  const Held held(saved);
  return saved && PyObject_SetAttr(context, to_save_name, saved) == 0 &&
         PyObject_SetAttr(context, materialize_name, Py_False) == 0 && PyObject_SetAttr(context, recipe_name, recipe) == 0;
}

bool wrong_arguments() {
  PyErr_SetString(PyExc_TypeError, "called by anybody but ops/_recorded.py");
  return false;
}

// The recipe of a forward pass: the last of `expected` arguments.
Recipe* recipe_of(PyObject* const* args, Py_ssize_t count, Py_ssize_t expected) {
  if (!Torch::get() || count != expected || !is_recipe(args[count - 1])) return wrong_arguments(), nullptr;
  return reinterpret_cast<Recipe*>(args[count - 1]);
}

bool needs_gradient(PyObject* needs, Py_ssize_t i) { return PyTuple_GET_ITEM(needs, i) == Py_True; }

// A new tensor of the recipe's shape.
PyObject* output(const Torch& torch, const Recipe& recipe, Dtype dtype, void** address) {
  return allocate(torch, recipe.shape, recipe.strides, torch.dtype(dtype), address);
}

// ---- Backward passes --------------------------------------------------------------------------------------------------------

// What every backward pass begins with: the recipe of the forward pass, and what is needed.
struct Recorded {
  explicit Recorded(PyObject* context)
      : context(context), recipe(PyObject_GetAttr(context, recipe_name)), needs(PyObject_GetAttr(context, needs_name)) {}

  bool whole(Py_ssize_t inputs) const {
    return recipe && needs &&
           ((is_recipe(recipe.get()) && PyTuple_Check(needs.get()) && PyTuple_GET_SIZE(needs.get()) >= inputs) ||
            wrong_arguments());
  }
  const Recipe& forward() const { return *reinterpret_cast<Recipe*>(recipe.get()); }
  PyObject* info() const { return forward().info; }
  bool need(Py_ssize_t i) const { return needs_gradient(needs.get(), i); }

  // Unpacks the saved tensors: hooks run, and one that was written since raises. To be done once only, so what comes after it
  // goes on with them in Python (see `otherwise`).
  PyObject* unpack(Py_ssize_t expected) const {
    PyObject* saved = PyObject_GetAttr(context, saved_name);
    if (!saved || (PyTuple_Check(saved) && PyTuple_GET_SIZE(saved) == expected)) return saved;
    Py_DECREF(saved);
    return wrong_arguments(), nullptr;
  }

  PyObject* const context;
  const Held recipe, needs;
};

// Python's backward pass, after the tensors were unpacked.
PyObject* otherwise(Op op, const Recorded& recorded, PyObject* dy, PyObject* saved) {
  if (PyErr_Occurred()) return nullptr;
  PyObject* const args[] = {recorded.context, dy, saved};
  return PyObject_Vectorcall(registered[op].takes_over, args, 3, nullptr);
}

// Each gradient is false where Python has to compute it, or with a Python exception set. dy is the call's first operand, and may
// be one already.
bool input_gradient(Call& call, PyObject** out) {
  if (!call.tensor(2)) return false;
  const Held found(call.recipe());
  if (!found || found.get() == Py_None) return false;
  const auto& recipe = *reinterpret_cast<Recipe*>(found.get());
  void* dx;
  Held tensor(output(call.torch(), recipe, call.operand(0).dtype, &dx));
  if (!tensor || !run(recipe, Conv2dArgs{dx, call.operand(1).data, nullptr, nullptr, call.operand(0).data})) return false;
  *out = tensor.release();
  return true;
}

bool weight_gradient(Call& call, const Recorded& recorded, bool with_bias, PyObject** dw_out, PyObject** db_out) {
  if (!call.begin(4) || !call.serial(recorded.forward()) || !call.tensor(1) || !call.tensor(2) || !call.flag(3)) return false;
  const Held found(call.recipe());
  if (!found || found.get() == Py_None) return false;
  const auto& recipe = *reinterpret_cast<Recipe*>(found.get());
  const Dtype dtype = call.operand(0).dtype;
  void *dw, *db = nullptr;
  Held dw_tensor(output(call.torch(), recipe, dtype, &dw));
  // The info of such a recipe is the shape and the strides of db.
  PyObject *shape, *strides;
  if (!dw_tensor || !PyArg_ParseTuple(recipe.info, "OO", &shape, &strides)) return false;
  Held db_tensor(with_bias ? allocate(call.torch(), shape, strides, call.torch().dtype(dtype), &db) : none());
  if (!db_tensor || !run(recipe, Conv2dArgs{call.operand(1).data, dw, db, nullptr, call.operand(0).data})) return false;
  *dw_out = dw_tensor.release();
  *db_out = db_tensor.release();
  return true;
}

// (context, dy) of conv2d and linear: dx, dw, db and None for the recipe.
PyObject* backward_product(Op dgrad, Op wgrad, PyObject* const* args, Py_ssize_t count) {
  if (count != 2) return wrong_arguments(), nullptr;
  PyObject* dy = args[1];
  const Recorded recorded(args[0]);
  if (!recorded.whole(3)) return nullptr;
  const bool need_dx = recorded.need(0), need_dw = recorded.need(1), need_db = recorded.need(2);
  if (dy == Py_None || (need_db && !need_dw)) return none();  // nothing to compute, or a plain sum: Python's
  PyObject* dx_args[] = {recorded.info(), dy, nullptr};
  Call dx_call(dgrad, dx_args, 3);
  if (!dx_call.begin(3) || dx_call.recording() || !dx_call.serial(recorded.forward()) || !dx_call.tensor(1))
    return dx_call.pass();

  const Held saved(recorded.unpack(2));
  if (!saved) return nullptr;
  dx_args[2] = PyTuple_GET_ITEM(saved.get(), 1);
  PyObject* dw_args[] = {recorded.info(), dy, PyTuple_GET_ITEM(saved.get(), 0), need_db ? Py_True : Py_False};
  Call dw_call(wgrad, dw_args, 4);
  PyObject *dx = nullptr, *dw = nullptr, *db = nullptr;
  const bool done =
      (!need_dx || input_gradient(dx_call, &dx)) && (!need_dw || weight_gradient(dw_call, recorded, need_db, &dw, &db));
  const Held dx_held(dx ? dx : none()), dw_held(dw ? dw : none()), db_held(db ? db : none());
  if (!done) return otherwise(dgrad, recorded, dy, saved.get());
  return PyTuple_Pack(4, dx_held.get(), dw_held.get(), db_held.get(), Py_None);
}

// (context, dy) of a pool: dx and None for the recipe.
PyObject* backward_pool(Op op, bool indices, PyObject* const* args, Py_ssize_t count) {
  if (count != 2) return wrong_arguments(), nullptr;
  PyObject* dy = args[1];
  if (dy == Py_None) return none();
  const Recorded recorded(args[0]);
  if (!recorded.whole(1)) return nullptr;
  PyObject* const dx_args[] = {recorded.info(), dy};
  Call call(op, dx_args, 2);
  if (!call.begin(2) || call.recording() || !call.serial(recorded.forward()) || !call.tensor(1)) return call.pass();

  const Held saved(recorded.unpack(indices ? 1 : 0));
  if (!saved) return nullptr;
  int64_t* positions = nullptr;
  if (indices) {
    positions = call.torch().read_indices(PyTuple_GET_ITEM(saved.get(), 0), call.operand(0));
    if (!positions) return otherwise(op, recorded, dy, saved.get());
  }
  const Held found(call.recipe());
  if (!found || found.get() == Py_None) return otherwise(op, recorded, dy, saved.get());
  const auto& recipe = *reinterpret_cast<Recipe*>(found.get());
  void* dx;
  const Held out(output(call.torch(), recipe, call.operand(0).dtype, &dx));
  if (!out || !run(recipe, Pool2dArgs{dx, call.operand(0).data, positions})) return nullptr;
  return PyTuple_Pack(2, out.get(), Py_None);
}

}  // namespace

bool prepare_gradients() {
  to_save_name = PyUnicode_InternFromString("to_save");
  materialize_name = PyUnicode_InternFromString("materialize_grads");
  recipe_name = PyUnicode_InternFromString("recipe");
  needs_name = PyUnicode_InternFromString("needs_input_grad");
  saved_name = PyUnicode_InternFromString("saved_tensors");
  return to_save_name && materialize_name && recipe_name && needs_name && saved_name;
}

// ---- Forward passes -----------------------------------------------------------------------------------------------------------

PyObject* record_product(PyObject*, PyObject* const* args, Py_ssize_t count) {
  const Recipe* recipe = recipe_of(args, count, 5);
  if (!recipe) return nullptr;
  const Torch& torch = *Torch::get();
  Operand x, w, bias{};
  if (!torch.read_own(args[1], &x) || !torch.read_own(args[2], &w)) return nullptr;
  if (args[3] != Py_None && !torch.read_own(args[3], &bias)) return nullptr;
  const Held needs(PyObject_GetAttr(args[0], needs_name));
  if (!needs) return nullptr;
  // A gradient needs the other operand only: a frozen layer keeps no activation.
  PyObject* saved =
      PyTuple_Pack(2, needs_gradient(needs.get(), 1) ? args[1] : Py_None, needs_gradient(needs.get(), 0) ? args[2] : Py_None);
  if (!remember(args[0], saved, args[4])) return nullptr;
  void* address;
  Held y(output(torch, *recipe, x.dtype, &address));
  if (!y || !run(*recipe, Conv2dArgs{x.data, w.data, bias.data, nullptr, address})) return nullptr;
  return y.release();
}

PyObject* record_max(PyObject*, PyObject* const* args, Py_ssize_t count) {
  const Recipe* recipe = recipe_of(args, count, 3);
  if (!recipe) return nullptr;
  const Torch& torch = *Torch::get();
  Operand x;
  if (!torch.read_own(args[1], &x)) return nullptr;
  void *address, *positions;
  Held y(output(torch, *recipe, x.dtype, &address));
  const Held indices(allocate(torch, recipe->shape, recipe->strides, torch.int64(), &positions));
  if (!y || !indices || !run(*recipe, Pool2dArgs{x.data, address, static_cast<int64_t*>(positions)})) return nullptr;
  return remember(args[0], PyTuple_Pack(1, indices.get()), args[2]) ? y.release() : nullptr;
}

PyObject* record_avg(PyObject*, PyObject* const* args, Py_ssize_t count) {
  const Recipe* recipe = recipe_of(args, count, 3);
  if (!recipe) return nullptr;
  const Torch& torch = *Torch::get();
  Operand x;
  if (!torch.read_own(args[1], &x)) return nullptr;
  if (PyObject_SetAttr(args[0], materialize_name, Py_False) || PyObject_SetAttr(args[0], recipe_name, args[2])) return nullptr;
  void* address;
  Held y(output(torch, *recipe, x.dtype, &address));
  if (!y || !run(*recipe, Pool2dArgs{x.data, address, nullptr})) return nullptr;
  return y.release();
}

PyObject* backward_conv2d(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return backward_product(kConv2dDgrad, kConv2dWgrad, args, count);
}

PyObject* backward_linear(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return backward_product(kLinearDgrad, kLinearWgrad, args, count);
}

PyObject* backward_max_pool2d(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return backward_pool(kMaxPool2dBwd, true, args, count);
}

PyObject* backward_avg_pool2d(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return backward_pool(kAvgPool2dBwd, false, args, count);
}

PyObject* backward_adaptive_avg_pool2d(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return backward_pool(kAdaptiveAvgPool2dBwd, false, args, count);
}

}  // namespace fastconv

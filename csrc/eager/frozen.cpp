#include "eager/frozen.h"

#include "eager/call.h"

namespace fastconv {
namespace {

// Where the operands and the packed weights stand among the arguments.
constexpr int kWeight = 1, kKept = 4;

PyObject *weight_name, *by_recipe_name, *version_name;

// The value of one of our own attributes, borrowed from its object, which goes on holding it. Null with an exception set.
PyObject* held(PyObject* object, PyObject* name) {
  PyObject* value = PyObject_GetAttr(object, name);
  Py_XDECREF(value);
  return value;
}

// What torch counts up when it writes to a tensor; 0 for one made in inference mode, of which it does not know.
long long version(PyObject* tensor) {
  PyObject* value = PyObject_GetAttr(tensor, version_name);
  const long long version = value ? PyLong_AsLongLong(value) : 0;
  Py_XDECREF(value);
  PyErr_Clear();
  return version;
}

// The packed weights of this recipe, as PackedFilters.for_recipe has left them or makes them now: a new reference, for somebody
// else may let go of them while the kernel runs. None where it reads the weight as it is, null with an exception set.
PyObject* find_packed(Op op, PyObject* const* args, const void* weight, PyObject* recipe) {
  PyObject* of = held(args[kKept], weight_name);
  PyObject* by_recipe = of ? held(args[kKept], by_recipe_name) : nullptr;
  if (!by_recipe) return nullptr;
  PyObject* known = nullptr;
  if (PyTuple_CheckExact(of) && PyLong_AsVoidPtr(PyTuple_GET_ITEM(of, 0)) == weight &&
      PyLong_AsLongLong(PyTuple_GET_ITEM(of, 1)) == version(args[kWeight])) {
    PyObject* serial = PyLong_FromLongLong(reinterpret_cast<Recipe*>(recipe)->serial);
    known = serial ? PyDict_GetItemWithError(by_recipe, serial) : nullptr;
    Py_XDECREF(serial);
  }
  if (known || PyErr_Occurred()) {
    Py_XINCREF(known);
    return known;
  }
  PyObject* const asked[] = {args[kKept], args[kWeight], recipe};
  return PyObject_Vectorcall(registered[op].takes_over, asked, 3, nullptr);
}

PyObject* answer(Op op, Call& call, PyObject* const* args) {
  PyObject* found = call.recipe();
  if (!found || found == Py_None) return found;
  const auto& recipe = *reinterpret_cast<Recipe*>(found);
  Conv2dArgs given{call.operand(0).data, call.operand(1).data, call.operand(2).data, call.operand(3).data, nullptr};
  PyObject* packed = find_packed(op, args, given.w, found);
  PyObject* y = nullptr;
  Operand bytes{};
  if (packed && (packed == Py_None || call.torch().read_own(packed, &bytes))) {
    given.packed = bytes.data;
    y = allocate(call.torch(), recipe.shape, recipe.strides, call.torch().dtype(call.operand(0).dtype), &given.y);
    if (y && !run(recipe, given)) Py_CLEAR(y);
  }
  Py_XDECREF(packed);
  Py_DECREF(found);
  return y;
}

}  // namespace

PyObject* frozen_conv2d(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Call call(kFrozenConv2d, args, count);
  const bool ours = call.begin(10) && call.tensor(0) && call.tensor(kWeight) && call.optional_tensor(2) &&
                    call.optional_tensor(3) && !call.derives() && call.pair(5) && call.sizes(6) && call.pair(7) &&
                    call.integer(8) && call.name(9);
  return ours ? answer(kFrozenConv2d, call, args) : call.pass();
}

PyObject* frozen_linear(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Call call(kFrozenLinear, args, count);
  const bool ours = call.begin(6) && call.tensor(0) && call.tensor(kWeight) && call.optional_tensor(2) &&
                    call.optional_tensor(3) && !call.derives() && call.name(5);
  return ours ? answer(kFrozenLinear, call, args) : call.pass();
}

bool prepare_frozen() {
  weight_name = PyUnicode_InternFromString("weight");
  by_recipe_name = PyUnicode_InternFromString("by_recipe");
  version_name = PyUnicode_InternFromString("_version");
  return weight_name && by_recipe_name && version_name;
}

}  // namespace fastconv

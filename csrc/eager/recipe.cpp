#include "eager/recipe.h"

#include <structmember.h>

#include <algorithm>
#include <cstddef>
#include <unordered_map>

namespace fastconv {
namespace {

void deallocate(PyObject* self) {
  auto* recipe = reinterpret_cast<Recipe*>(self);
  delete recipe->plan;
  Py_XDECREF(recipe->shape);
  Py_XDECREF(recipe->strides);
  Py_XDECREF(recipe->info);
  PyTypeObject* type = Py_TYPE(self);
  type->tp_free(self);
  Py_DECREF(type);
}

PyMemberDef members[] = {{"info", T_OBJECT, offsetof(Recipe, info), READONLY, nullptr},
                         {"serial", T_LONGLONG, offsetof(Recipe, serial), READONLY, nullptr},
                         {nullptr, 0, 0, 0, nullptr}};
PyType_Slot slots[] = {{Py_tp_dealloc, reinterpret_cast<void*>(&deallocate)}, {Py_tp_members, members}, {0, nullptr}};
PyType_Spec spec{"fastconv._C.Recipe", sizeof(Recipe), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots};
PyTypeObject* type = nullptr;

struct Hash {
  size_t operator()(const Key& key) const { return key.hash(); }
};

// A recipe with its key takes about a kilobyte. More distinct problems than this come from sizes that change with every call;
// they gain little from being remembered, so that forgetting all of them is as good as an order of use, and costs a call nothing.
constexpr size_t kMost = 4096;

// Giving the GIL up and taking it again costs 0.2 us, and more where another thread takes it between. Python itself passes it on
// every 5 ms.
constexpr double kBriefSeconds = 20e-6;

using Table = std::unordered_map<Key, PyObject*, Hash>;

Table& table() {
  static Table* const kept = new Table;  // never destroyed: its objects may not outlive the interpreter
  return *kept;
}

}  // namespace

bool prepare_recipes() {
  type = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&spec));
  return type != nullptr;
}

bool is_recipe(PyObject* object) { return Py_TYPE(object) == type; }

PyObject* new_recipe(const AnyPlan& plan, PyObject* answer) {
  PyObject *shape, *strides, *info;
  if (!PyArg_ParseTuple(answer, "O!O!O", &PyTuple_Type, &shape, &PyTuple_Type, &strides, &info)) return nullptr;
  PyObject* self = type->tp_alloc(type, 0);
  if (!self) return nullptr;
  auto* recipe = reinterpret_cast<Recipe*>(self);
  recipe->plan = new AnyPlan(plan);
  Py_INCREF(shape);
  Py_INCREF(strides);
  Py_INCREF(info);
  recipe->shape = shape;
  recipe->strides = strides;
  recipe->info = info;
  recipe->brief = plan.predicted_seconds() < kBriefSeconds;
  static int64_t count = 0;
  recipe->serial = ++count;
  return self;
}

bool Key::operator==(const Key& other) const {
  return count_ == other.count_ && std::equal(words_.begin(), words_.begin() + count_, other.words_.begin());
}

size_t Key::hash() const {
  uint64_t sum = uint64_t(count_);
  for (int i = 0; i < count_; ++i) {
    // Two steps of a multiplicative hash: sizes differ in their low bits, buckets are told apart by them.
    sum = (sum ^ uint64_t(words_[i])) * 0x9E3779B97F4A7C15u;
    sum ^= sum >> 32;
  }
  return size_t(sum);
}

namespace recipes {

PyObject* find(const Key& key) {
  const auto found = table().find(key);
  return found == table().end() ? nullptr : found->second;
}

void insert(const Key& key, PyObject* value) {
  if (table().size() >= kMost) clear();
  Py_INCREF(value);
  auto [place, fresh] = table().emplace(key, value);
  if (!fresh) {
    Py_DECREF(place->second);
    place->second = value;
  }
}

void clear() {
  Table old;
  old.swap(table());
  for (const auto& [key, value] : old) Py_DECREF(value);
}

}  // namespace recipes
}  // namespace fastconv

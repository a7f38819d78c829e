// What a call does, worked out once for its operands and options: the plan, and the output to allocate.
#pragma once

#include <Python.h>

#include <array>
#include <cstdint>

#include "eager/any_plan.h"

namespace fastconv {

// A Python object, so that the graph of a recorded call can keep it after the table has forgotten it.
struct Recipe {
  PyObject ob_base;
  AnyPlan* plan;
  PyObject *shape, *strides;  // of the output, as tuples
  PyObject* info;             // what Python's half of the op wants to know in a backward pass
  bool brief;                 // whether the kernel is done before anybody could miss the GIL
  int64_t serial;             // no other recipe's: it names the forward call in the keys of its gradients
};

// Makes the type; false with a Python exception set.
bool prepare_recipes();
bool is_recipe(PyObject* object);
// A new reference from the answer of a resolver, a tuple (shape, strides, info) and the plan in it. Null with an exception set.
PyObject* new_recipe(const AnyPlan& plan, PyObject* answer);

// Which recipe: the op, threads, options, and each operand's sizes and strides, in the order in which the call appends them.
class Key {
 public:
  bool append(int64_t word) {
    if (count_ == int(words_.size())) return false;
    words_[count_++] = word;
    return true;
  }
  bool append(const int64_t* words, int count) {
    for (int i = 0; i < count; ++i) {
      if (!append(words[i])) return false;
    }
    return true;
  }
  bool operator==(const Key& other) const;
  size_t hash() const;

 private:
  // A convolution takes 29, linear with an 8-dimensional input 26, a frozen convolution with a residual 42.
  std::array<int64_t, 48> words_;
  int count_ = 0;
};

// The recipes of all ops, by key. Under the GIL.
namespace recipes {
// Borrowed: a Recipe, None where Python answers, or null for a key not met before.
PyObject* find(const Key& key);
// Keeps a reference to the value.
void insert(const Key& key, PyObject* value);
void clear();
}  // namespace recipes

}  // namespace fastconv

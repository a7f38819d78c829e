// Both halves of the autograd.Functions of ops/_recorded.py: the forward pass with what it leaves in the context, and the usual
// backward pass, which records nothing itself.
#pragma once

#include <Python.h>

namespace fastconv {

// Makes the names of the context's attributes; false with a Python exception set.
bool prepare_gradients();

// (context, x, w, bias, recipe) -> y: conv2d and linear. (context, x, recipe) -> y: pools.
PyObject* record_product(PyObject*, PyObject* const* args, Py_ssize_t count);
PyObject* record_max(PyObject*, PyObject* const* args, Py_ssize_t count);
PyObject* record_avg(PyObject*, PyObject* const* args, Py_ssize_t count);

// (context, dy) -> the gradients of the forward's arguments, or None where Python's half has to look.
PyObject* backward_conv2d(PyObject*, PyObject* const* args, Py_ssize_t count);
PyObject* backward_linear(PyObject*, PyObject* const* args, Py_ssize_t count);
PyObject* backward_max_pool2d(PyObject*, PyObject* const* args, Py_ssize_t count);
PyObject* backward_avg_pool2d(PyObject*, PyObject* const* args, Py_ssize_t count);
PyObject* backward_adaptive_avg_pool2d(PyObject*, PyObject* const* args, Py_ssize_t count);

}  // namespace fastconv

// Layers whose weights do not change: python/fastconv/fusion/frozen.py.
#pragma once

#include <Python.h>

namespace fastconv {

// (input, weight, bias, residual, kept, stride, padding, dilation, groups, activation) -> y. `kept` is an ops/_packed.py
// PackedFilters; padding has four sides.
PyObject* frozen_conv2d(PyObject*, PyObject* const* args, Py_ssize_t count);

// (input, weight, bias, residual, kept, activation) -> y
PyObject* frozen_linear(PyObject*, PyObject* const* args, Py_ssize_t count);

// False with a Python exception set.
bool prepare_frozen();

}  // namespace fastconv

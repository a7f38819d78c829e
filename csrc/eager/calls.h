// The calls of functional.py on plain tensors, each as one C function: it reads the operands, looks the recipe up, allocates the
// output and runs the kernel. They return None for everything that is not plain or not ours, and Python goes on as if they had
// not been called.
#pragma once

#include <Python.h>

namespace fastconv {

// Adds the functions eager_* to the module. False with a Python exception set.
bool add_eager_calls(PyObject* module);

}  // namespace fastconv

// What the files of the Python face share.
#pragma once

#include <pybind11/pybind11.h>

#include "file_bytes.h"

// The bytes of a file named by path, or of a Python bytes object.
tinyllama::FileBytes open_bytes(const pybind11::object& path, const pybind11::object& data);

void bind_gguf(pybind11::module_& m);
void bind_kernels(pybind11::module_& m);

// What the files of the Python face share.
#pragma once

#include <pybind11/pybind11.h>

#include <chrono>

#include "file_bytes.h"

// The bytes of a file named by path, or of a Python bytes object.
tinyllama::FileBytes open_bytes(const pybind11::object& path, const pybind11::object& data);

// Lets Ctrl-C through: called with the GIL released, between pieces of native work. The GIL may be
// long in coming where other threads run Python, so it is asked for now and then only.
class SignalCheck {
public:
    static constexpr std::chrono::milliseconds interval{50};

    void operator()() {
        if (Clock::now() < next_) return;
        {
            const pybind11::gil_scoped_acquire gil;
            if (PyErr_CheckSignals() != 0) throw pybind11::error_already_set();
        }
        next_ = Clock::now() + interval;
    }

private:
    using Clock = std::chrono::steady_clock;
    Clock::time_point next_ = Clock::now() + interval;
};

void bind_gguf(pybind11::module_& m);
void bind_kernels(pybind11::module_& m);
void bind_scheduler(pybind11::module_& m);

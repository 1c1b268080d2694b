// GGUF files for the Python side: their metadata and the raw bytes of their tensors.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <utility>
#include <variant>

#include "bindings.h"
#include "gguf.h"

namespace py = pybind11;
using namespace tinyllama;

FileBytes open_bytes(const py::object& path, const py::object& data) {
    if (!path.is_none()) return FileBytes::map(path.cast<std::string>());
    const auto view = data.cast<std::string_view>();
    return FileBytes::copy_of({reinterpret_cast<const std::uint8_t*>(view.data()), view.size()});
}

namespace {

struct GgufReader {
    FileBytes bytes;
    GgufFile file;
};

std::shared_ptr<GgufReader> open_gguf(const py::object& data, const py::object& path,
                                      const std::string& name) {
    FileBytes bytes = open_bytes(path, data);
    GgufFile file = GgufFile::parse(bytes.span(), name);
    return std::make_shared<GgufReader>(GgufReader{std::move(bytes), std::move(file)});
}

py::object gguf_value(const GgufValue& value) {
    return std::visit(
        [](const auto& v) -> py::object {
            using T = std::decay_t<decltype(v)>;
            if constexpr (std::is_same_v<T, GgufStrings>) {
                py::list items;
                for (const std::string& s : v.items) {
                    items.append(py::reinterpret_steal<py::object>(PyUnicode_DecodeUTF8(
                        s.data(), static_cast<Py_ssize_t>(s.size()), "replace")));
                }
                return items;
            } else if constexpr (std::is_same_v<T, GgufFloats> || std::is_same_v<T, GgufInts>) {
                return py::cast(v.items);
            } else if constexpr (std::is_same_v<T, std::string>) {
                return py::reinterpret_steal<py::object>(
                    PyUnicode_DecodeUTF8(v.data(), static_cast<Py_ssize_t>(v.size()), "replace"));
            } else {
                return py::cast(v);
            }
        },
        value);
}

py::dict gguf_metadata(const GgufReader& reader) {
    py::dict result;
    for (const auto& [key, value] : reader.file.metadata()) {
        result[py::str(key)] = gguf_value(value);
    }
    return result;
}

py::list gguf_tensors(const GgufReader& reader) {
    py::list result;
    for (const GgufTensor& tensor : reader.file.tensors()) {
        py::tuple shape = py::make_tuple(tensor.rows, tensor.cols);
        if (tensor.n_dims == 1) shape = py::make_tuple(tensor.cols);
        result.append(py::make_tuple(tensor.name, dtype_name(tensor.dtype), shape));
    }
    return result;
}

py::array gguf_tensor_bytes(const std::shared_ptr<GgufReader>& reader, const std::string& name) {
    const GgufTensor* tensor = reader->file.find_tensor(name);
    if (tensor == nullptr) {
        throw Error(Status::format_error, reader->file.name() + ": tensor " + name + " is missing");
    }
    py::array_t<std::uint8_t> view(static_cast<py::ssize_t>(tensor->bytes.size), tensor->bytes.data,
                                   py::cast(reader));
    view.attr("setflags")(py::arg("write") = false);
    return view;
}

}  // namespace

void bind_gguf(py::module_& m) {
    py::class_<GgufReader, std::shared_ptr<GgufReader>>(m, "GgufReader")
        .def(py::init(&open_gguf), py::arg("data") = py::none(), py::arg("path") = py::none(),
             py::arg("name") = "model")
        .def("metadata", &gguf_metadata)
        .def("tensors", &gguf_tensors)
        .def("tensor_bytes", &gguf_tensor_bytes, py::arg("name"));
}

// The Python face: conversion, error mapping, and the release of the GIL. No logic.

#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "kernels/cpu.h"
#include "kv_cache.h"
#include "model.h"
#include "parallel.h"
#include "scoring.h"
#include "session.h"

namespace py = pybind11;
using namespace tinyllama;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

const char* error_class(Status status) {
    switch (status) {
        case Status::format_error:
            return "FormatError";
        case Status::config_error:
            return "ConfigError";
        case Status::context_full:
            return "ContextFullError";
        case Status::nonfinite:
            return "NonFiniteError";
        case Status::busy:
            return "BusyError";
        default:
            return "ArgumentError";
    }
}

void translate_error(std::exception_ptr pointer) {
    try {
        if (pointer) std::rethrow_exception(pointer);
    } catch (const Error& error) {
        if (error.code() == Status::io_error) {
            PyErr_SetString(PyExc_OSError, error.what());
            return;
        }
        const py::object errors = py::module_::import("tinyllama.errors");
        PyErr_SetString(errors.attr(error_class(error.code())).ptr(), error.what());
    }
}

std::shared_ptr<const Model> open_model(const py::object& path, const py::object& data,
                                        std::string name, int n_threads, const std::string& isa,
                                        const std::string& kv_dtype, std::int32_t max_seq_len) {
    if (path.is_none() == data.is_none()) {
        throw Error(Status::invalid_argument, "give either path or data");
    }
    if (name.empty()) name = path.is_none() ? "model" : path.cast<std::string>();
    const FileBytes bytes = open_bytes(path, data);
    const py::gil_scoped_release release;
    return Model::open(bytes, name, {n_threads, isa, kv_dtype, max_seq_len, {}});
}

py::dict config_dict(const Model& model) {
    const Config& c = model.config();
    py::dict result;
    result["dim"] = c.dim;
    result["hidden_dim"] = c.hidden_units;
    result["n_layers"] = c.n_layers;
    result["n_heads"] = c.n_heads;
    result["n_kv_heads"] = c.n_kv_heads;
    result["head_dim"] = c.head_dim;
    result["vocab_size"] = c.vocab_size;
    result["max_seq_len"] = c.max_seq_len;
    result["rope_theta"] = c.rope_theta;
    result["rope_factors"] = c.rope_factors;
    result["norm_eps"] = c.norm_eps;
    result["tie_embeddings"] = c.tie_embeddings;
    return result;
}

py::dict info_dict(const Model& model) {
    py::dict result;
    result["path"] = model.name();
    result["dtype"] = dtype_name(model.weights().layers.front().wq.dtype);
    result["isa"] = model.kernels().name;
    result["n_threads"] = model.threads().size();
    result["n_threads_alone"] = model.n_threads_alone();
    result["parameters"] = model.weights().n_parameters;
    result["bytes"] = model.weights().n_bytes;
    result["kv_dtype"] = kv_type_name(model.kv_layout().type);
    result["kv_bytes_per_token"] = model.kv_layout().bytes_per_position();
    return result;
}

using Tokens = std::vector<std::int32_t>;

py::list feed_sessions(const std::vector<Session*>& sessions, const std::vector<Tokens>& tokens,
                       bool all_logits) {
    if (sessions.size() != tokens.size()) {
        throw Error(Status::invalid_argument, std::to_string(sessions.size()) +
                                                  " sessions, but tokens for " +
                                                  std::to_string(tokens.size()));
    }
    py::list results;
    std::vector<Feed> feeds;
    for (std::size_t i = 0; i < sessions.size(); ++i) {
        const auto rows = static_cast<py::ssize_t>(all_logits ? tokens[i].size() : 0);
        py::array_t<float> logits(
            {rows, static_cast<py::ssize_t>(sessions[i]->model().config().vocab_size)});
        feeds.push_back({sessions[i], tokens[i], rows > 0 ? logits.mutable_data() : nullptr});
        results.append(std::move(logits));
    }
    const py::gil_scoped_release release;
    feed(feeds, SignalCheck());
    return results;
}

void trace_session(Session& session, const Tokens& tokens, const py::function& tap) {
    const Tap show = [&](const std::string& stage, const float* values, std::int64_t n_rows,
                         std::int64_t width) {
        const py::gil_scoped_acquire gil;
        tap(stage, py::array_t<float>({n_rows, width}, values));
    };
    std::vector<float> logits(tokens.size() *
                              static_cast<std::size_t>(session.model().config().vocab_size));
    const py::gil_scoped_release release;
    feed({{&session, tokens, logits.data()}}, SignalCheck(), &show);
}

py::array_t<double> score_tokens(Session& session, const Tokens& tokens) {
    std::vector<double> scores;
    {
        const py::gil_scoped_release release;
        scores = score(session, tokens, SignalCheck());
    }
    return py::array_t<double>(static_cast<py::ssize_t>(scores.size()), scores.data());
}

void bind_text(py::module_& m) {
    py::class_<Tokenizer>(m, "Tokenizer")
        .def_property_readonly("vocab_size", &Tokenizer::vocab_size)
        .def_property_readonly("bos_id", &Tokenizer::bos_id)
        .def_property_readonly("eos_id", &Tokenizer::eos_id)
        .def_property_readonly("unk_id", &Tokenizer::unk_id)
        .def_property_readonly("add_bos", &Tokenizer::add_bos)
        .def("encode", &Tokenizer::encode, py::arg("text"), py::arg("bos"), py::arg("eos"),
             py::arg("at_start") = true, py::call_guard<py::gil_scoped_release>())
        .def(
            "decode",
            [](const Tokenizer& self, const Tokens& tokens, bool at_start) {
                return py::bytes(self.decode(tokens, at_start));
            },
            py::arg("tokens"), py::arg("at_start") = true)
        .def(
            "token_bytes",
            [](const Tokenizer& self, std::int32_t token) {
                return py::bytes(self.token_bytes(token));
            },
            py::arg("token"));

    py::class_<StreamDecoder, std::shared_ptr<StreamDecoder>>(m, "StreamDecoder")
        .def(py::init<const Tokenizer&, bool>(), py::arg("tokenizer"), py::arg("at_start"),
             py::keep_alive<1, 2>())
        .def(
            "copy", [](const StreamDecoder& self) { return std::make_shared<StreamDecoder>(self); },
            py::keep_alive<0, 1>())
        .def("push", &StreamDecoder::push, py::arg("token"))
        .def("finish", &StreamDecoder::finish);
}

void bind_model(py::module_& m) {
    py::class_<SamplingParams>(m, "SamplingParams")
        .def(py::init<>())
        .def_readwrite("temperature", &SamplingParams::temperature)
        .def_readwrite("top_k", &SamplingParams::top_k)
        .def_readwrite("top_p", &SamplingParams::top_p)
        .def_readwrite("min_p", &SamplingParams::min_p)
        .def_readwrite("repetition_penalty", &SamplingParams::repetition_penalty)
        .def_readwrite("presence_penalty", &SamplingParams::presence_penalty)
        .def_readwrite("frequency_penalty", &SamplingParams::frequency_penalty)
        .def_readwrite("n_prompt_tokens", &SamplingParams::n_prompt_tokens)
        .def_readwrite("logit_bias", &SamplingParams::logit_bias)
        .def_readwrite("banned", &SamplingParams::banned);

    // A model is const in C++; pybind11 holds it as shared_ptr<Model> and only const methods
    // are bound.
    py::class_<Model, std::shared_ptr<Model>>(m, "Model")
        .def(py::init([](const py::object& path, const py::object& data, const std::string& name,
                         int n_threads, const std::string& isa, const std::string& kv_dtype,
                         std::int32_t max_seq_len) {
                 return std::const_pointer_cast<Model>(
                     open_model(path, data, name, n_threads, isa, kv_dtype, max_seq_len));
             }),
             py::arg("path") = py::none(), py::arg("data") = py::none(), py::arg("name") = "",
             py::arg("n_threads") = 0, py::arg("isa") = "", py::arg("kv_dtype") = "",
             py::arg("max_seq_len") = 0)
        .def(
            "spell",
            [](const Model& self, const std::string& text, bool at_start) {
                return self.token_trie().spell(text, at_start);
            },
            py::arg("text"), py::arg("at_start") = false)
        .def_property_readonly("tokenizer", &Model::tokenizer,
                               py::return_value_policy::reference_internal)
        .def_property_readonly("config", &config_dict)
        .def_property_readonly("info", &info_dict);
}

void bind_session(py::module_& m) {
    py::class_<Session, std::shared_ptr<Session>>(m, "Session")
        .def(py::init([](const std::shared_ptr<Model>& model, std::uint64_t seed) {
                 return std::make_shared<Session>(model, seed);
             }),
             py::arg("model"), py::arg("seed"))
        .def_property_readonly("tokens", &Session::tokens)
        .def_property_readonly("n_tokens", &Session::n_tokens)
        .def_property_readonly("seed", &Session::seed)
        .def("logits",
             [](Session& self) {
                 std::vector<float> logits;
                 {
                     const py::gil_scoped_release release;
                     logits = self.logits();
                 }
                 return py::array_t<float>(static_cast<py::ssize_t>(logits.size()), logits.data());
             })
        .def_property_readonly("n_unread", &Session::n_unread)
        .def(
            "append", [](Session& self, const Tokens& tokens) { self.append(tokens); },
            py::arg("tokens"))
        .def("drop_cache", &Session::drop_cache)
        .def("rewind", &Session::rewind, py::arg("n_tokens"),
             py::call_guard<py::gil_scoped_release>())
        .def("fork", &Session::fork, py::arg("seed"), py::call_guard<py::gil_scoped_release>());

    m.def("forward", &feed_sessions, py::arg("sessions"), py::arg("tokens"),
          py::arg("all_logits") = false);
    m.def(
        "sample",
        [](Session& session, const SamplingParams& params, const StreamDecoder* text) {
            return session.sample(params, text);
        },
        py::arg("session"), py::arg("params"), py::arg("text") = nullptr,
        py::call_guard<py::gil_scoped_release>());
    m.def("logprob", &Session::log_probability, py::arg("session"), py::arg("token"),
          py::call_guard<py::gil_scoped_release>());
    m.def("top_logprobs", &Session::top_log_probabilities, py::arg("session"), py::arg("n"),
          py::call_guard<py::gil_scoped_release>());
    m.def("score", &score_tokens, py::arg("session"), py::arg("tokens"));
    m.def(
        "score_ways",
        [](Session& session, const std::vector<Tokens>& ways) {
            return score_ways(session, ways, SignalCheck());
        },
        py::arg("session"), py::arg("ways"), py::call_guard<py::gil_scoped_release>());
    m.def(
        "score_texts",
        [](const std::shared_ptr<Model>& model, const std::vector<Tokens>& texts,
           const Tokens& n_given, const py::function& progress) {
            SignalCheck check;
            std::size_t n_told = 0;
            const auto tell = [&](std::size_t n_done) {
                check();
                if (n_done == n_told) return;
                const py::gil_scoped_acquire gil;
                progress(n_done - n_told);
                n_told = n_done;
            };
            std::vector<std::pair<double, bool>> result;
            for (const Likelihood& one : score_texts(model, texts, n_given, tell))
                result.emplace_back(one.logprob, one.greedy);
            return result;
        },
        py::arg("model"), py::arg("texts"), py::arg("n_given"), py::arg("progress"),
        py::call_guard<py::gil_scoped_release>());
    m.def("trace", &trace_session, py::arg("session"), py::arg("tokens"), py::arg("tap"));
}

}  // namespace

PYBIND11_MODULE(_core, m) {
    m.doc() = "The compiled core of tinyllama.";
    m.attr("__version__") = TINYLLAMA_VERSION;
    py::register_exception_translator(&translate_error);
    m.def("supported_isas", [] {
        std::vector<std::string> names;
        for (const char* const* name = supported_isas(); *name != nullptr; ++name) {
            names.emplace_back(*name);
        }
        return names;
    });
    bind_gguf(m);
    bind_text(m);
    bind_model(m);
    bind_session(m);
    bind_scheduler(m);
    bind_kernels(m);
}

// The Python face: conversion, error mapping, and the release of the GIL. No logic.

#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "bindings.h"
#include "kernels/cpu.h"
#include "kv_cache.h"
#include "model.h"
#include "parallel.h"
#include "save.h"
#include "scheduler.h"
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

// Lets Ctrl-C through: called with the GIL released, between pieces of native work. The GIL may be
// long in coming where other threads run Python, so it is asked for now and then only.
class SignalCheck {
public:
    void operator()() {
        if (Clock::now() < next_) return;
        {
            const py::gil_scoped_acquire gil;
            if (PyErr_CheckSignals() != 0) throw py::error_already_set();
        }
        next_ = Clock::now() + interval;
    }

private:
    using Clock = std::chrono::steady_clock;
    static constexpr std::chrono::milliseconds interval{50};
    Clock::time_point next_ = Clock::now() + interval;
};

std::shared_ptr<const Model> open_model(const py::object& path, const py::object& data,
                                        std::string name, int n_threads, const std::string& isa,
                                        const std::string& kv_dtype, std::int32_t max_seq_len) {
    if (path.is_none() == data.is_none()) {
        throw Error(Status::invalid_argument, "give either path or data");
    }
    if (name.empty()) name = path.is_none() ? "model" : path.cast<std::string>();
    const FileBytes bytes = open_bytes(path, data);
    const py::gil_scoped_release release;
    return Model::open(bytes, name, {n_threads, isa, kv_dtype, max_seq_len});
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
        .def_property_readonly("tokenizer", &Model::tokenizer,
                               py::return_value_policy::reference_internal)
        .def_property_readonly("config", &config_dict)
        .def_property_readonly("info", &info_dict);
}

py::tuple restore_blob(const std::shared_ptr<Model>& model, const py::buffer& blob) {
    const py::buffer_info info = blob.request();
    const auto size = static_cast<std::size_t>(info.size * info.itemsize);
    const Restored restored = restore(model, {static_cast<const std::uint8_t*>(info.ptr), size});
    py::object decoder = py::none(), request = py::none();
    if (restored.decoder) decoder = py::cast(std::make_shared<StreamDecoder>(*restored.decoder));
    if (restored.request) request = py::cast(*restored.request);
    return py::make_tuple(restored.session, decoder, request);
}

void bind_session(py::module_& m) {
    py::class_<RequestState>(m, "RequestState");
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
        .def("append", py::overload_cast<const Tokens&>(&Session::append), py::arg("tokens"))
        .def("drop_cache", &Session::drop_cache)
        .def("rewind", &Session::rewind, py::arg("n_tokens"),
             py::call_guard<py::gil_scoped_release>())
        .def("fork", &Session::fork, py::arg("seed"), py::call_guard<py::gil_scoped_release>());

    m.def(
        "save",
        [](Session& session, const StreamDecoder* decoder, bool cache) {
            return py::bytes(save(session, decoder, cache));
        },
        py::arg("session"), py::arg("decoder"), py::arg("cache"));
    m.def("restore", &restore_blob, py::arg("model"), py::arg("blob"));
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
    m.def("trace", &trace_session, py::arg("session"), py::arg("tokens"), py::arg("tap"));
}

py::list logprobs_of(const Request& request) {
    py::list result;
    for (const TokenLogprob& step : request.logprobs())
        result.append(py::make_tuple(step.token, step.logprob, step.top));
    return result;
}

std::optional<const char*> ending_name(Ending ending) {
    switch (ending) {
        case Ending::none:
            return std::nullopt;
        case Ending::stop:
            return "stop";
        case Ending::length:
            return "length";
        case Ending::cancelled:
            return "cancelled";
        case Ending::deadline:
            return "deadline";
        default:
            return "error";
    }
}

py::dict stats_dict(Scheduler& scheduler) {
    const Scheduler::Stats stats = scheduler.stats();
    py::dict result;
    result["n_live"] = stats.n_live;
    result["n_waiting"] = stats.n_waiting;
    result["tokens_read"] = stats.n_read;
    result["tokens_shared"] = stats.n_shared;
    result["tokens_drawn"] = stats.n_drawn;
    result["kv_bytes"] = stats.kv_bytes;
    result["pieces"] = stats.n_pieces;
    result["spent_ms"] = 1e3 * stats.spent.count();
    result["next_piece_ms"] = 1e3 * stats.next_piece.count();
    return result;
}

// What a step did for one request: the Python object, which a subclass may have made.
struct RequestEvent {
    py::object request;
    std::string text;
    Tokens tokens;
    bool done = false;
};

// One for each request, in the order in which something first became of it.
std::vector<RequestEvent> by_request(const std::vector<Event>& events) {
    std::vector<RequestEvent> result;
    std::unordered_map<const Request*, std::size_t> places;
    for (const Event& event : events) {
        const auto [place, is_new] = places.try_emplace(event.request.get(), result.size());
        if (is_new)
            result.push_back(
                {py::cast(event.request), std::string(event.request->take_text()), {}, false});
        RequestEvent& mine = result[place->second];
        if (event.token >= 0) {
            mine.tokens.push_back(event.token);
        } else {
            mine.done = true;
        }
    }
    return result;
}

Overflow find_overflow(const std::string& name) {
    if (name == "stop") return Overflow::stop;
    if (name == "shift") return Overflow::shift;
    if (name == "truncate") return Overflow::truncate;
    if (name == "error") return Overflow::error;
    throw Error(Status::invalid_argument,
                "on_overflow is '" + name + "'; it must be stop, shift, truncate or error");
}

Urgency urgency(std::int32_t priority, std::optional<double> deadline_ms) {
    Urgency result{priority, Clock::time_point::max()};
    constexpr double longest_ms = 1e12;  // thirty years; more is none
    if (deadline_ms && *deadline_ms < longest_ms)
        result.deadline =
            Clock::now() + std::chrono::duration_cast<Clock::duration>(
                               std::chrono::duration<double, std::milli>(*deadline_ms));
    return result;
}

void bind_scheduler(py::module_& m) {
    py::class_<Request, std::shared_ptr<Request>>(m, "Request")
        .def(py::init([](std::shared_ptr<Session> session, Tokens prompt,
                         std::shared_ptr<StreamDecoder> decoder, const SamplingParams& params,
                         std::optional<std::int32_t> max_new_tokens, std::int32_t min_new_tokens,
                         Tokens end_tokens, std::vector<std::string> stops,
                         const std::string& on_overflow, std::int32_t n_keep,
                         std::optional<std::int32_t> n_top, std::int32_t priority,
                         std::optional<double> deadline_ms) {
                 Limits limits{max_new_tokens,
                               min_new_tokens,
                               std::move(end_tokens),
                               std::move(stops),
                               find_overflow(on_overflow),
                               n_keep};
                 return std::make_shared<Request>(std::move(session), prompt, std::move(decoder),
                                                  params, std::move(limits), n_top,
                                                  urgency(priority, deadline_ms));
             }),
             py::arg("session"), py::arg("prompt"), py::arg("decoder"), py::arg("params"),
             py::arg("max_new_tokens") = py::none(), py::arg("min_new_tokens") = 0,
             py::arg("end_tokens") = Tokens(), py::arg("stops") = std::vector<std::string>(),
             py::arg("on_overflow") = "stop", py::arg("n_keep") = 1, py::arg("n_top") = py::none(),
             py::arg("priority") = 0, py::arg("deadline_ms") = py::none(), py::keep_alive<1, 4>())
        .def(py::init<std::shared_ptr<Session>, const RequestState&>(), py::arg("session"),
             py::arg("state"))
        .def(
            "save", [](const Request& self, bool cache) { return py::bytes(save(self, cache)); },
            py::arg("cache") = false)
        .def_property_readonly("decoder", &Request::decoder)
        .def_property_readonly("text", &Request::text)
        .def_property_readonly("tokens", &Request::tokens)
        .def_property_readonly("logprobs", &logprobs_of)
        .def_property_readonly("finish_reason",
                               [](const Request& self) { return ending_name(self.ending()); })
        .def_property_readonly("paused", &Request::paused)
        .def("rethrow", &Request::rethrow)
        .def("cancel", &Request::cancel)
        .def("pause", &Request::pause)
        .def("resume", &Request::resume);

    py::class_<RequestEvent>(m, "Event")
        .def_readonly("request", &RequestEvent::request)
        .def_readonly("text", &RequestEvent::text)
        .def_property_readonly(
            "tokens", [](const RequestEvent& self) { return py::tuple(py::cast(self.tokens)); })
        .def_readonly("done", &RequestEvent::done)
        .def("__repr__", [](const RequestEvent& self) {
            return "<tinyllama.Event: " + std::to_string(self.tokens.size()) + " tokens, " +
                   (self.done ? "done" : "live") + ">";
        });

    py::class_<Scheduler>(m, "Scheduler")
        .def(py::init<std::shared_ptr<Model>, std::int64_t, std::int64_t>(),
             py::call_guard<py::gil_scoped_release>(), py::arg("model"), py::arg("max_live") = 64,
             py::arg("n_positions") = 0)
        .def("warm_up", &Scheduler::warm_up, py::call_guard<py::gil_scoped_release>())
        .def("submit", &Scheduler::submit, py::arg("request"))
        .def(
            "step",
            [](Scheduler& self, std::optional<double> budget_ms) {
                std::vector<RequestEvent> result;
                const auto deliver = [&](const std::vector<Event>& events) {
                    const py::gil_scoped_acquire gil;
                    result = by_request(events);
                };
                const py::gil_scoped_release release;
                if (budget_ms) {
                    self.step(Seconds(*budget_ms / 1e3), SignalCheck(), deliver);
                } else {
                    self.step(SignalCheck(), deliver);
                }
                return result;
            },
            py::arg("budget_ms") = py::none())
        .def_property_readonly("stats", &stats_dict)
        .def(
            "run", [](Scheduler& self) { return self.run(SignalCheck()); },
            py::call_guard<py::gil_scoped_release>());
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

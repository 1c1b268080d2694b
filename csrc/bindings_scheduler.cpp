// The Python face of requests and schedulers.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "background.h"
#include "bindings.h"
#include "save.h"
#include "scheduler.h"
#include "session.h"

namespace py = pybind11;
using namespace tinyllama;

namespace {

using Tokens = std::vector<std::int32_t>;
// A thread that works may hold what is waited for, and need the GIL.
using release = py::call_guard<py::gil_scoped_release>;

py::tuple restore_blob(const std::shared_ptr<Model>& model, const py::object& blob) {
    struct View : Py_buffer {
        explicit View(const py::object& object) {
            if (PyObject_GetBuffer(object.ptr(), this, PyBUF_SIMPLE) != 0)
                throw py::error_already_set();
        }
        View(const View&) = delete;
        View& operator=(const View&) = delete;
        ~View() { PyBuffer_Release(this); }
    } const view(blob);
    const Restored restored = restore(
        model, {static_cast<const std::uint8_t*>(view.buf), static_cast<std::size_t>(view.len)});
    py::object decoder = py::none(), request = py::none();
    if (restored.decoder) decoder = py::cast(std::make_shared<StreamDecoder>(*restored.decoder));
    if (restored.request) request = py::cast(*restored.request);
    return py::make_tuple(restored.session, decoder, request);
}

py::list logprobs_of(const Request& request) {
    py::list result;
    std::vector<TokenLogprob> logprobs;
    {
        const py::gil_scoped_release nogil;
        logprobs = request.logprobs();
    }
    for (const TokenLogprob& step : logprobs)
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

py::dict stats_dict(const Scheduler::Stats& stats) {
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

// An Outcome with the Python object, which a subclass may have made.
struct RequestEvent {
    py::object request;
    std::string text;
    Tokens tokens;
    bool done = false;
};

std::vector<RequestEvent> with_python(std::vector<Outcome> outcomes) {
    std::vector<RequestEvent> result;
    for (Outcome& outcome : outcomes)
        result.push_back({py::cast(outcome.request), std::move(outcome.text),
                          std::move(outcome.tokens), outcome.done});
    return result;
}

// Runs what calls Python, with the GIL. Of an exception its message alone is kept: it would hold on
// to the frames that it came through, and so to the request that it ended. An interrupt comes again
// where it is waited for.
template <typename F>
auto in_python(const F& call) {
    const py::gil_scoped_acquire gil;
    std::string message;
    try {
        return call();
    } catch (const py::error_already_set& error) {
        message = py::str(error.value()).cast<std::string>();
        if (!error.matches(PyExc_Exception)) {
            PyErr_SetInterrupt();
            message = "interrupted";
        }
    }
    throw Error(Status::invalid_argument, message);
}

// A Python object with the methods of a Constraint; see Matcher in grammar.py.
class PythonConstraint : public Constraint {
public:
    explicit PythonConstraint(py::object matcher) : matcher_(std::move(matcher)) {}
    PythonConstraint(const PythonConstraint&) = delete;
    PythonConstraint& operator=(const PythonConstraint&) = delete;
    ~PythonConstraint() override {
        const py::gil_scoped_acquire gil;
        matcher_ = py::object();
    }

    void find_allowed(Allowed* allowed) override {
        using Found = std::pair<std::string, bool>;
        const auto [mask, end] =
            in_python([&] { return matcher_.attr("find_allowed")().cast<Found>(); });
        allowed->tokens.clear();
        allowed->end = end;
        for (std::size_t i = 0; i < 8 * mask.size(); ++i) {
            const auto byte = static_cast<unsigned char>(mask[i / 8]);
            if (((byte >> (i % 8)) & 1) != 0)
                allowed->tokens.push_back(static_cast<std::int32_t>(i));
        }
    }
    std::vector<std::int32_t> find_forced() override {
        return in_python([&] { return matcher_.attr("find_forced")().cast<Tokens>(); });
    }
    void accept(std::int32_t token) override {
        in_python([&] { matcher_.attr("accept")(token); });
    }

private:
    py::object matcher_;
};

// Its thread may need the GIL before it stops.
struct LetWork {
    void operator()(Background* background) const {
        const py::gil_scoped_release nogil;
        if (background->is_of_this_process()) delete background;
    }
};

std::unique_ptr<Constraint> constraint_of(const py::object& matcher) {
    if (matcher.is_none()) return nullptr;
    return std::make_unique<PythonConstraint>(matcher);
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

}  // namespace

void bind_scheduler(py::module_& m) {
    py::class_<RequestState>(m, "RequestState")
        .def_property_readonly("form", [](const RequestState& self) {
            return std::make_pair(self.form.kind, self.form.texts);
        });
    m.def(
        "save",
        [](Session& session, const StreamDecoder* decoder, bool cache) {
            return py::bytes(save(session, decoder, cache));
        },
        py::arg("session"), py::arg("decoder"), py::arg("cache"));
    m.def("restore", &restore_blob, py::arg("model"), py::arg("blob"));
    py::class_<Request, std::shared_ptr<Request>>(m, "Request")
        .def(py::init([](std::shared_ptr<Session> session, Tokens prompt,
                         std::shared_ptr<StreamDecoder> decoder, const SamplingParams& params,
                         std::optional<std::int32_t> max_new_tokens, std::int32_t min_new_tokens,
                         Tokens end_tokens, std::vector<std::string> stops,
                         const std::string& on_overflow, std::int32_t n_keep,
                         std::optional<std::int32_t> n_top, std::int32_t priority,
                         std::optional<double> deadline_ms, const std::string& form,
                         std::vector<std::string> form_texts, const py::object& matcher) {
                 Limits limits{max_new_tokens,
                               min_new_tokens,
                               std::move(end_tokens),
                               std::move(stops),
                               find_overflow(on_overflow),
                               n_keep};
                 return std::make_shared<Request>(
                     std::move(session), prompt, std::move(decoder), params, std::move(limits),
                     n_top, urgency(priority, deadline_ms), Form{form, std::move(form_texts)},
                     constraint_of(matcher));
             }),
             py::arg("session"), py::arg("prompt"), py::arg("decoder"), py::arg("params"),
             py::arg("max_new_tokens") = py::none(), py::arg("min_new_tokens") = 0,
             py::arg("end_tokens") = Tokens(), py::arg("stops") = std::vector<std::string>(),
             py::arg("on_overflow") = "stop", py::arg("n_keep") = 1, py::arg("n_top") = py::none(),
             py::arg("priority") = 0, py::arg("deadline_ms") = py::none(), py::arg("form") = "",
             py::arg("form_texts") = std::vector<std::string>(), py::arg("matcher") = py::none(),
             py::keep_alive<1, 4>())
        .def(py::init([](std::shared_ptr<Session> session, const RequestState& state,
                         const py::object& matcher) {
                 return std::make_shared<Request>(std::move(session), state,
                                                  constraint_of(matcher));
             }),
             py::arg("session"), py::arg("state"), py::arg("matcher") = py::none())
        .def(
            "save",
            [](const Request& self, bool cache) {
                std::string blob;
                {
                    const py::gil_scoped_release nogil;
                    blob = save(self, cache);
                }
                return py::bytes(blob);
            },
            py::arg("cache") = false)
        .def_property_readonly("decoder", &Request::decoder)
        .def_property_readonly("text", py::cpp_function(&Request::text, release()))
        .def_property_readonly("tokens", py::cpp_function(&Request::tokens, release()))
        .def_property_readonly("logprobs", &logprobs_of)
        .def_property_readonly(
            "finish_reason",
            py::cpp_function([](const Request& self) { return ending_name(self.ending()); },
                             release()))
        .def_property_readonly("paused", &Request::paused)
        .def("rethrow", &Request::rethrow, release())
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
        .def(py::init<std::shared_ptr<Model>, std::int64_t>(),
             py::call_guard<py::gil_scoped_release>(), py::arg("model"), py::arg("max_live") = 64)
        .def("reserve", &Scheduler::reserve, py::call_guard<py::gil_scoped_release>(),
             py::arg("n_positions"))
        .def("warm_up", &Scheduler::warm_up, py::call_guard<py::gil_scoped_release>())
        .def("submit", &Scheduler::submit, py::arg("request"))
        .def(
            "step",
            [](Scheduler& self, std::optional<double> budget_ms) {
                std::vector<RequestEvent> result;
                const auto deliver = [&](const std::vector<Event>& events) {
                    const py::gil_scoped_acquire gil;
                    result = with_python(by_request(events));
                };
                const py::gil_scoped_release nogil;
                if (budget_ms) {
                    self.step(Seconds(*budget_ms / 1e3), SignalCheck(), deliver);
                } else {
                    self.step(SignalCheck(), deliver);
                }
                return result;
            },
            py::arg("budget_ms") = py::none())
        .def_property_readonly("stats", [](Scheduler& self) { return stats_dict(self.stats()); })
        .def(
            "run", [](Scheduler& self) { return self.run(SignalCheck()); },
            py::call_guard<py::gil_scoped_release>());

    py::class_<Background, std::unique_ptr<Background, LetWork>>(m, "Background")
        .def(py::init<std::shared_ptr<Model>, std::int64_t, std::int64_t>(),
             py::call_guard<py::gil_scoped_release>(), py::arg("model"), py::arg("max_live") = 64,
             py::arg("n_positions") = 0)
        .def("submit", &Background::submit, py::arg("request"),
             py::call_guard<py::gil_scoped_release>())
        .def("stop", &Background::stop, py::call_guard<py::gil_scoped_release>())
        .def("wake", &Background::wake, py::call_guard<py::gil_scoped_release>())
        .def(
            "step",
            [](Background& self, std::optional<double> budget_ms) {
                std::vector<Outcome> outcomes;
                {
                    const py::gil_scoped_release nogil;
                    bool idle = false;
                    if (budget_ms) {
                        outcomes = self.take(Seconds{0}, &idle);
                    } else {
                        for (SignalCheck check; outcomes.empty() && !idle; check())
                            outcomes = self.take(SignalCheck::interval, &idle);
                    }
                }
                return with_python(std::move(outcomes));
            },
            py::arg("budget_ms") = py::none())
        .def(
            "save",
            [](Background& self, const Request& request, bool cache) {
                std::string blob;
                {
                    const py::gil_scoped_release nogil;
                    blob = self.save(request, cache);
                }
                return py::bytes(blob);
            },
            py::arg("request"), py::arg("cache") = false)
        .def_property_readonly("stats", [](Background& self) {
            Scheduler::Stats stats;
            {
                const py::gil_scoped_release nogil;
                stats = self.stats();
            }
            return stats_dict(stats);
        });
}

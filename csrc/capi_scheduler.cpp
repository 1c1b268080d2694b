// The C face of schedulers: requests by number, events by polling. In steady state nothing here
// takes memory.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <exception>
#include <unordered_map>
#include <vector>

#include "capi.h"
#include "save.h"
#include "scheduler.h"

using namespace tinyllama;

static_assert(static_cast<int>(Overflow::error) == TL_ERROR);
static_assert(static_cast<int>(Ending::deadline) == TL_DEADLINE);
static_assert(static_cast<int>(Ending::error) == TL_FAILED);

struct tl_scheduler {
    tl_scheduler(const std::shared_ptr<const Model>& model, const tl_scheduler_def& def)
        : scheduler(model, def.max_sessions), slots(static_cast<std::size_t>(def.max_requests)) {
        scheduler.warm_up();
        scheduler.reserve(def.reserve_tokens);
        events.reserve(slots.size());
        errors.reserve(slots.size());  // events point at them
        const auto n_tokens = static_cast<std::size_t>(16 * std::min(def.max_sessions, 4096));
        tokens.reserve(n_tokens);
        texts.reserve(16 * n_tokens);
        places.reserve(slots.size());
    }

    struct Slot {
        std::shared_ptr<Request> request;
        void* user = nullptr;
        std::uint32_t number = 0;   // of its request
        std::ptrdiff_t event = -1;  // in events, while they are made
    };

    tl_request handle(std::size_t slot) const {
        return std::uint64_t{slots[slot].number} << 32 | (slot + 1);
    }
    Slot& slot_of(tl_request request) {
        const std::size_t i = (request & 0xFFFFFFFFu) - 1;
        if (i >= slots.size() || slots[i].request == nullptr || slots[i].number != request >> 32)
            refuse("there is no request " + std::to_string(request) + ", or it has ended");
        return slots[i];
    }
    std::size_t free_slot() const;
    void enter(std::size_t slot, std::shared_ptr<Request> request, void* user);
    void take(const std::vector<Event>& happened);
    void describe_end(const Request& request, tl_event* event);

    std::atomic<bool> in_use{false};
    Scheduler scheduler;
    std::vector<Slot> slots;
    std::unordered_map<const Request*, std::size_t> places;  // of requests in slots
    std::vector<tl_event> events;
    std::size_t next_event = 0;
    std::string texts;                 // of the events, one after the other
    std::vector<std::int32_t> tokens;  // likewise
    std::vector<std::string> errors;
};

// So that a request of one scheduler is none of another's.
static std::atomic<std::uint32_t> n_requests{1};

std::size_t tl_scheduler::free_slot() const {
    for (std::size_t i = 0; i < slots.size(); ++i)
        if (slots[i].request == nullptr) return i;
    throw Error(static_cast<Status>(TL_NO_MEMORY),
                "there are max_requests (" + std::to_string(slots.size()) + ") already");
}

void tl_scheduler::enter(std::size_t slot, std::shared_ptr<Request> request, void* user) {
    places[request.get()] = slot;
    try {
        scheduler.submit(request);
    } catch (...) {
        places.erase(request.get());
        throw;
    }
    slots[slot].request = std::move(request);
    slots[slot].user = user;
    slots[slot].number = n_requests.fetch_add(1);
}

// One event for each request. Texts and tokens may move while they are collected: what points at
// them is set at the end.
void tl_scheduler::take(const std::vector<Event>& happened) {
    for (const Event& one : happened)
        slots[places.at(one.request.get())].event = -1;
    tokens.reserve(happened.size());
    for (const Event& one : happened) {
        Slot& slot = slots[places.at(one.request.get())];
        if (slot.event < 0) {
            slot.event = static_cast<std::ptrdiff_t>(events.size());
            tl_event event = {};
            event.request = handle(static_cast<std::size_t>(&slot - slots.data()));
            event.user = slot.user;
            event.n_text = texts.size();
            one.request->take_text(&texts);
            event.n_text = texts.size() - event.n_text;
            events.push_back(event);
        }
        tl_event& event = events[static_cast<std::size_t>(slot.event)];
        if (one.token >= 0) {
            event.n_tokens += 1;
        } else {
            describe_end(*one.request, &event);
        }
    }
    std::size_t n_tokens = 0, n_text = 0;
    for (const tl_event& event : events)
        n_tokens += event.n_tokens;
    tokens.resize(n_tokens);
    n_tokens = 0;
    for (tl_event& event : events) {
        event.text = texts.data() + n_text;
        event.tokens = tokens.data() + n_tokens;
        n_text += event.n_text;
        n_tokens += std::exchange(event.n_tokens, 0);
    }
    for (const Event& one : happened) {
        Slot& slot = slots[places.at(one.request.get())];
        tl_event& event = events[static_cast<std::size_t>(slot.event)];
        if (one.token < 0) continue;
        tokens[static_cast<std::size_t>(event.tokens - tokens.data()) + event.n_tokens] = one.token;
        event.n_tokens += 1;
    }
    for (const tl_event& event : events) {
        Slot& slot = slot_of(event.request);
        slot.event = -1;
        slot.request->forget();
        if (event.finish == TL_GOES_ON) continue;
        places.erase(slot.request.get());
        slot.request = nullptr;
    }
}

void tl_scheduler::describe_end(const Request& request, tl_event* event) {
    event->finish = static_cast<tl_finish>(request.ending());
    if (event->finish != TL_FAILED) return;
    event->status = TL_IO_ERROR;
    try {
        request.rethrow();
    } catch (...) {
        std::string message;
        event->status = describe(std::current_exception(), &message);
        errors.push_back(std::move(message));  // there is room
        event->error = errors.back().c_str();
    }
}

namespace {

std::vector<std::string> copy_strings(const char* const* strings, std::size_t n, const char* name) {
    require(strings, n, name);
    std::vector<std::string> result;
    for (std::size_t i = 0; i < n; ++i) {
        require(strings[i], name);
        result.emplace_back(strings[i]);
        if (result.back().empty()) refuse(std::string(name) + " holds an empty string");
    }
    return result;
}

SamplingParams params_of(const tl_request_def& def) {
    require(def.bias_tokens, def.n_bias, "bias_tokens");
    require(def.bias_values, def.n_bias, "bias_values");
    SamplingParams params;
    params.temperature = def.temperature;
    params.top_k = def.top_k;
    params.top_p = def.top_p;
    params.min_p = def.min_p;
    params.repetition_penalty = def.repetition_penalty;
    params.presence_penalty = def.presence_penalty;
    params.frequency_penalty = def.frequency_penalty;
    for (std::size_t i = 0; i < def.n_bias; ++i) {
        if (std::isinf(def.bias_values[i]) && def.bias_values[i] < 0) {
            params.banned.push_back(def.bias_tokens[i]);
        } else {
            params.logit_bias.emplace_back(def.bias_tokens[i], def.bias_values[i]);
        }
    }
    return params;
}

Limits limits_of(const tl_request_def& def, const Tokenizer& tokenizer) {
    if (def.max_new_tokens < 0) refuse("max_new_tokens is " + std::to_string(def.max_new_tokens));
    if (def.min_new_tokens < 0) refuse("min_new_tokens is " + std::to_string(def.min_new_tokens));
    if (def.on_overflow < TL_STOP || def.on_overflow > TL_ERROR)
        refuse("on_overflow is " + std::to_string(def.on_overflow));
    Limits limits;
    if (def.max_new_tokens > 0) limits.max_new_tokens = def.max_new_tokens;
    limits.min_new_tokens = def.min_new_tokens;
    for (const std::int32_t token : {tokenizer.eos_id(), tokenizer.bos_id()})
        if (token >= 0) limits.end_tokens.push_back(token);
    limits.stops = copy_strings(def.stops, def.n_stops, "stops");
    limits.on_overflow = static_cast<Overflow>(def.on_overflow);
    limits.n_keep = def.n_keep;
    return limits;
}

Urgency urgency_of(const tl_request_def& def) {
    if (!(def.deadline_ms >= 0)) refuse("deadline_ms is not 0 or more");
    Urgency urgency{def.priority, Clock::time_point::max()};
    constexpr double longest_ms = 1e12;  // thirty years; more is none
    if (def.deadline_ms > 0 && def.deadline_ms < longest_ms)
        urgency.deadline = Clock::now() + std::chrono::duration_cast<Clock::duration>(
                                              Seconds(def.deadline_ms / 1e3));
    return urgency;
}

}  // namespace

extern "C" {

tl_status tl_scheduler_create(tl_model* model, const tl_scheduler_def* def,
                              tl_scheduler** scheduler) {
    return guarded([&] {
        require(model, "model");
        require(scheduler, "scheduler");
        const tl_scheduler_def d = read_def(def, tl_default_scheduler_def(), "tl_scheduler_def");
        constexpr std::int32_t most = 1 << 20;
        if (d.max_sessions < 1 || d.max_sessions > most)
            refuse("max_sessions is " + std::to_string(d.max_sessions));
        if (d.max_requests < 1 || d.max_requests > most)
            refuse("max_requests is " + std::to_string(d.max_requests));
        if (d.reserve_tokens < 0) refuse("reserve_tokens is " + std::to_string(d.reserve_tokens));
        *scheduler = std::make_unique<tl_scheduler>(model->model, d).release();
    });
}

void tl_scheduler_close(tl_scheduler* scheduler) { delete scheduler; }

tl_status tl_scheduler_submit(tl_scheduler* scheduler, const tl_request_def* def,
                              tl_request* request) {
    return guarded([&] {
        require(scheduler, "scheduler");
        const Turn turn(scheduler->in_use);
        const tl_request_def d = read_def(def, tl_default_request_def(), "tl_request_def");
        require(d.session, "session");
        const std::size_t slot = scheduler->free_slot();
        const std::shared_ptr<Session>& session = d.session->session;
        const std::shared_ptr<Request> before = d.session->request.lock();
        if (before != nullptr && before->ending() == Ending::none)
            refuse("the session has a request that goes on");
        const Tokenizer& tokenizer = session->model().tokenizer();
        Form form;
        form.texts = copy_strings(d.choices, d.n_choices, "choices");
        if (!form.texts.empty()) form.kind = "choices";
        std::shared_ptr<StreamDecoder> text = d.session->text;
        if (text == nullptr || !form.kind.empty())
            text = std::make_shared<StreamDecoder>(tokenizer, is_at_start(*session));
        const auto made =
            std::make_shared<Request>(session, std::vector<std::int32_t>(), text, params_of(d),
                                      limits_of(d, tokenizer), std::nullopt, urgency_of(d), form);
        scheduler->enter(slot, made, d.user);
        d.session->text = form.kind.empty() ? text : nullptr;
        d.session->request = made;
        if (request != nullptr) *request = scheduler->handle(slot);
    });
}

tl_status tl_scheduler_step(tl_scheduler* scheduler, double budget_ms) {
    return guarded([&] {
        require(scheduler, "scheduler");
        const Turn turn(scheduler->in_use);
        if (!(budget_ms >= 0)) refuse("budget_ms is not 0 or more");
        const auto deliver = [scheduler](const std::vector<Event>& happened) {
            scheduler->events.clear();
            scheduler->next_event = 0;
            scheduler->texts.clear();
            scheduler->errors.clear();
            scheduler->take(happened);
        };
        constexpr double longest_ms = 1e9;
        scheduler->scheduler.step(Seconds(std::min(budget_ms, longest_ms) / 1e3), [] {}, deliver);
    });
}

bool tl_scheduler_next_event(tl_scheduler* scheduler, tl_event* event) {
    if (scheduler == nullptr || event == nullptr) return false;
    if (scheduler->in_use.exchange(true)) return false;
    const bool is_one = scheduler->next_event < scheduler->events.size();
    if (is_one) *event = scheduler->events[scheduler->next_event++];
    scheduler->in_use.store(false);
    return is_one;
}

tl_status tl_request_cancel(tl_scheduler* scheduler, tl_request request) {
    return guarded([&] {
        require(scheduler, "scheduler");
        const Turn turn(scheduler->in_use);
        scheduler->slot_of(request).request->cancel();
    });
}

tl_status tl_request_pause(tl_scheduler* scheduler, tl_request request, bool paused) {
    return guarded([&] {
        require(scheduler, "scheduler");
        const Turn turn(scheduler->in_use);
        Request& found = *scheduler->slot_of(request).request;
        paused ? found.pause() : found.resume();
    });
}

tl_status tl_request_save(tl_scheduler* scheduler, tl_request request, bool with_cache, void* blob,
                          size_t capacity, size_t* n) {
    return guarded([&] {
        require(scheduler, "scheduler");
        const Turn turn(scheduler->in_use);
        require(blob, capacity, "blob");
        require(n, "n");
        const std::string saved = save(*scheduler->slot_of(request).request, with_cache);
        fill(saved.data(), saved.size(), static_cast<char*>(blob), capacity, n);
    });
}

tl_status tl_request_restore(tl_scheduler* scheduler, const void* blob, size_t n, void* user,
                             tl_session** session, tl_request* request) {
    return guarded([&] {
        require(scheduler, "scheduler");
        const Turn turn(scheduler->in_use);
        require(blob, n, "blob");
        require(session, "session");
        const std::size_t slot = scheduler->free_slot();
        Restored restored =
            restore(scheduler->scheduler.model(), {static_cast<const std::uint8_t*>(blob), n});
        if (!restored.request) refuse("a session was saved, not a request: tl_session_restore()");
        auto made = std::make_unique<tl_session>();
        made->session = std::move(restored.session);
        const auto again = std::make_shared<Request>(made->session, *restored.request);
        if (restored.request->form.kind.empty()) made->text = again->decoder();
        made->request = again;
        scheduler->enter(slot, again, user);
        *session = made.release();
        if (request != nullptr) *request = scheduler->handle(slot);
    });
}

tl_status tl_scheduler_get_stats(tl_scheduler* scheduler, tl_stats* stats) {
    return guarded([&] {
        require(scheduler, "scheduler");
        const Turn turn(scheduler->in_use);
        require(stats, "stats");
        const Scheduler::Stats found = scheduler->scheduler.stats();
        tl_stats result = {};
        result.n_live = found.n_live;
        result.n_waiting = found.n_waiting;
        result.tokens_read = found.n_read;
        result.tokens_shared = found.n_shared;
        result.tokens_drawn = found.n_drawn;
        result.kv_bytes = found.kv_bytes;
        result.spent_ms = 1e3 * found.spent.count();
        result.next_piece_ms = 1e3 * found.next_piece.count();
        *stats = result;
    });
}

}  // extern "C"

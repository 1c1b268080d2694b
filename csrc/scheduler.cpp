#include "scheduler.h"

#include <algorithm>
#include <unordered_map>

namespace tinyllama {

namespace {

template <typename T>
void make_room(std::vector<T>* list, std::size_t n) {
    if (list->capacity() < n) list->reserve(std::max(n, 2 * list->capacity()));
}

}  // namespace

Scheduler::Scheduler(std::shared_ptr<const Model> model, std::int64_t max_live, bool alone)
    : model_(std::move(model)),
      max_live_(max_live),
      alone_(alone),
      pass_(std::make_unique<Pass>(*model_)) {
    // Sixteen tokens of each in one step: no step in a frame makes more.
    events_.reserve(static_cast<std::size_t>(16 * std::min<std::int64_t>(max_live_, 4096)));
    // A flight has no more rows, so no more parts: it takes no memory for them, however late the
    // first is that has time for so many.
    rows_.reserve(max_rows);
    parts_.reserve(max_rows);
    locks_.reserve(max_rows);
}

Scheduler::~Scheduler() {
    abandon();
    for (const auto& request : live_)
        request->election_ = nullptr;  // its scouts keep it
    if (keeps_memory_) model_->kv_pool()->let_go();
}

void Scheduler::reserve(std::int64_t n_positions) {
    model_->kv_pool()->keep(
        static_cast<std::size_t>(n_positions / kv_block + (n_positions % kv_block != 0)));
    if (keeps_memory_) model_->kv_pool()->let_go();
    keeps_memory_ = true;
}

void Scheduler::warm_up() {
    const Turn turn(in_use_);
    abandon();
    const auto vocab_size = static_cast<std::size_t>(model_->config().vocab_size);
    const auto most = static_cast<std::size_t>(std::min<std::int64_t>(max_live_, max_rows));
    std::vector<KvCache> caches;
    std::vector<float> logits(vocab_size);
    for (std::size_t i = 0; i < most; ++i) {
        caches.emplace_back(model_->kv_pool());
        caches.back().reserve(0, 1);
    }
    for (std::size_t n = 1; n <= most; n = n < most ? std::min(2 * n, most) : n + 1) {
        rows_.clear();
        for (std::size_t i = 0; i < n; ++i)
            rows_.push_back({&caches[i], 0, 0, logits.data()});
        pass_->run(rows_);
        pass_->begin(rows_);
        while (pass_->n_left() > 0) {
            pieces_.assign(1, pass_->next(0));
            const Clock::time_point start = Clock::now();
            pass_->advance(1);
            costs_.learn(pieces_, Clock::now() - start);
        }
    }
    rows_.clear();
}

void Scheduler::submit(std::shared_ptr<Request> request) {
    const Turn turn(in_use_);
    if (&request->session_->model() != model_.get())
        throw Error(Status::invalid_argument, "the session is of another model");
    for (const auto& other : live_) {
        if (other->ending_ == Ending::none && other->session_ == request->session_)
            throw Error(Status::invalid_argument,
                        "the session is in this scheduler already, with a request that goes on");
    }
    make_room(&known_, known_.size() + 1);
    make_room(&live_, live_.size() + 1);
    make_room(&order_, live_.size() + 1);
    make_room(&drawing_, live_.size() + 1);
    make_room(&draws_, live_.size() + 1);
    request->begin();
    known_.erase(std::remove_if(known_.begin(), known_.end(),
                                [&](const auto& weak) {
                                    const std::shared_ptr<Request> other = weak.lock();
                                    return other == nullptr ||
                                           (alone_ && other->ending_ != Ending::none);
                                }),
                 known_.end());
    request->id_ = ++n_submitted_;
    request->source_ = find_source(*request);
    known_.push_back(request);
    live_.push_back(std::move(request));
}

void Scheduler::step(Seconds budget, const Check& check, const Deliver& deliver) {
    const Turn turn(in_use_);
    Budget whole(budget - delivery_);
    if (budget > Seconds{0}) wake_threads();
    obey();
    while (work(whole, check))
        check();
    finish_step(deliver);
}

void Scheduler::step(const Check& check, const Deliver& deliver) {
    const Turn turn(in_use_);
    Budget whole(Budget::unlimited);
    wake_threads();
    obey();
    while (events_.empty() && work(whole, check))
        check();
    finish_step(deliver);
}

// But not for a lone text that one thread continues best.
void Scheduler::wake_threads() {
    if (live_.size() > 1 || (live_.size() == 1 && model_->n_threads_alone() > 1))
        model_->threads().wake();
}

// Events that a step which threw did not deliver come with the next.
void Scheduler::finish_step(const Deliver& deliver) {
    remove_ended();
    const Clock::time_point start = Clock::now();
    deliver(events_);
    delivery_ += (Clock::now() - start - delivery_) / 8;
    events_.clear();
}

std::vector<std::shared_ptr<Request>> Scheduler::run(const Check& check) {
    const Turn turn(in_use_);
    events_.clear();
    Budget whole(Budget::unlimited);
    for (;;) {
        obey();
        std::vector<std::shared_ptr<Request>> ended = remove_ended();
        if (!ended.empty() || !work(whole, check)) return ended;
        check();
        events_.clear();
    }
}

void Scheduler::end_all(Ending ending, const std::exception_ptr& error, const Deliver& deliver) {
    const Turn turn(in_use_);
    abandon();
    for (const auto& request : live_) {
        request->conclude(ending, error);
        if (!request->announced_) announce(request);
    }
    finish_step(deliver);
}

Clock::time_point Scheduler::next_deadline() {
    const Turn turn(in_use_);
    Clock::time_point next = Clock::time_point::max();
    for (const auto& request : live_)
        next = std::min(next, request->urgency_.deadline);
    return next;
}

Scheduler::Stats Scheduler::stats() {
    const Turn turn(in_use_);
    Stats stats = stats_;
    stats.kv_bytes = model_->kv_pool()->bytes_in_use();
    for (const auto& request : live_) {
        if (request->is_scout_) continue;
        stats.n_live += 1;
        stats.n_waiting += request->n_drawn() == 0 ? 1 : 0;
    }
    if (!parts_.empty() && pass_->n_left() > 0) stats.next_piece = costs_.estimate(pass_->next(0));
    return stats;
}

// Goes on with the flight, or begins one. False when nothing more can be done now.
bool Scheduler::work(Budget& budget, const Check& check) {
    obey();
    if (!flying_ && (budget.left() <= Seconds{0} || !begin_flight(budget))) return false;
    return fly(budget, check) && draw(budget, check);
}

// Does what was asked for since the last piece of work.
void Scheduler::obey() {
    const Clock::time_point now = Clock::now();
    for (const auto& request : live_) {
        if (request->ending_ != Ending::none) {
            if (!request->announced_) announce(request);  // there was nothing to do
            continue;
        }
        const Wish wish = wish_of(*request);
        if (wish == Wish::end) {
            leave(*request);
            finish(request, Ending::cancelled);
        } else if (request->urgency_.deadline <= now) {
            leave(*request);
            finish(request, Ending::deadline);
        } else if (wish == Wish::pause) {
            leave(*request);
        }
    }
}

// Scouts do what is asked of those who sent them.
Wish Scheduler::wish_of(const Request& request) {
    const Wish own = request.wish_.load();
    if (!request.is_scout_ || own == Wish::end) return own;
    const std::shared_ptr<Request> elector = request.elector_.lock();
    if (elector == nullptr || elector->ending_ != Ending::none) return Wish::end;
    return elector->wish_.load();
}

void Scheduler::finish(const std::shared_ptr<Request>& request, Ending ending) {
    request->conclude(ending);
    announce(request);
}

void Scheduler::announce(const std::shared_ptr<Request>& request) {
    report(request);
    if (!request->is_scout_) events_.push_back({request, -1});
    request->announced_ = true;
}

// The tokens that are new.
void Scheduler::report(const std::shared_ptr<Request>& request) {
    if (request->is_scout_) return;
    for (std::size_t& n = request->n_reported_; n < request->tokens_.size(); ++n) {
        stats_.n_drawn += 1;
        events_.push_back({request, request->tokens_[n]});
    }
}

bool Scheduler::goes_on(const Request& request) {
    return request.ending_ == Ending::none && wish_of(request) == Wish::run;
}

void Scheduler::fail(const std::shared_ptr<Request>& request, std::exception_ptr error) {
    request->conclude(Ending::error, std::move(error));
    announce(request);
}

std::vector<std::shared_ptr<Request>> Scheduler::remove_ended() {
    std::vector<std::shared_ptr<Request>> ended;
    ended.reserve(
        static_cast<std::size_t>(std::count_if(live_.begin(), live_.end(), [](const auto& request) {
            return request->ending_ != Ending::none;
        })));
    std::size_t n_left = 0;
    for (auto& request : live_) {
        if (request->ending_ == Ending::none) {
            live_[n_left++].swap(request);
        } else if (!request->is_scout_) {
            ended.push_back(std::move(request));
        }
    }
    live_.resize(n_left);
    return ended;
}

std::vector<Outcome> by_request(const std::vector<Event>& events) {
    std::vector<Outcome> outcomes;
    std::unordered_map<const Request*, std::size_t> places;
    for (const Event& event : events) {
        const auto [place, is_new] = places.try_emplace(event.request.get(), outcomes.size());
        if (is_new) {
            outcomes.push_back({event.request, {}, {}, false});
            event.request->take_text(&outcomes.back().text);
        }
        Outcome& mine = outcomes[place->second];
        if (event.token >= 0) {
            mine.tokens.push_back(event.token);
        } else {
            mine.done = true;
        }
    }
    return outcomes;
}

}  // namespace tinyllama

#include "background.h"

#include <unistd.h>

#include <algorithm>
#include <exception>
#include <iterator>
#include <system_error>
#include <utility>

#include "save.h"

namespace tinyllama {
namespace {

struct Stopped {};

bool has_ended(const Outcome& outcome) { return outcome.done; }

}  // namespace

// Somebody else uses the scheduler; the thread lets him go first.
class Background::Visit {
public:
    explicit Visit(Background& host) : host_(host) {
        host.check_process();
        {
            const std::lock_guard<std::mutex> lock(host.mutex_);
            host.n_visitors_ += 1;
        }
        host.working_.lock();
    }
    Visit(const Visit&) = delete;
    Visit& operator=(const Visit&) = delete;
    ~Visit() {
        host_.working_.unlock();
        const std::lock_guard<std::mutex> lock(host_.mutex_);
        host_.n_visitors_ -= 1;
        host_.changed_.notify_all();
    }

private:
    Background& host_;
};

Background::Background(const std::shared_ptr<const Model>& model, std::int64_t max_live,
                       std::int64_t n_positions)
    : scheduler_(model, max_live, true), model_(model), process_(getpid()) {
    scheduler_.reserve(n_positions);
    try {
        thread_ = std::thread([this] { run(); });
    } catch (const std::system_error& error) {
        throw Error(Status::io_error, std::string("no thread can be started: ") + error.what());
    }
}

void Background::stop() {
    if (!thread_.joinable() || !is_of_this_process()) return;
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        stopping_.store(true);
        changed_.notify_all();
    }
    thread_.join();
    const std::lock_guard<std::mutex> working(working_);
    const auto hand_out = [this](const std::vector<Event>& events) { deliver(events); };
    scheduler_.end_all(Ending::cancelled, nullptr, hand_out);
    for (const auto& request : std::exchange(incoming_, {})) {
        request->conclude(Ending::cancelled);
        deliver({{request, -1}});
    }
}

bool Background::is_of_this_process() const { return process_ == getpid(); }

void Background::check_process() const {
    if (!is_of_this_process())
        throw Error(Status::busy,
                    "the scheduler's thread is in the process that this one was forked from");
}

void Background::submit(std::shared_ptr<Request> request) {
    check_process();
    if (&request->session().model() != model_.get())
        throw Error(Status::invalid_argument, "the session is of another model");
    const std::lock_guard<std::mutex> lock(mutex_);
    if (stopping_.load()) throw Error(Status::invalid_argument, "the scheduler was stopped");
    incoming_.reserve(incoming_.size() + 1);
    hold(request->session(), this);
    try {
        const ActingFor acting(this);
        request->begin();
    } catch (...) {
        let_go(request->session());
        throw;
    }
    incoming_.push_back(std::move(request));
    n_live_ += 1;
    woken_ = true;
    changed_.notify_all();
}

void Background::wake() {
    const std::lock_guard<std::mutex> lock(mutex_);
    woken_ = true;
    changed_.notify_all();
}

std::vector<Outcome> Background::take(Seconds longest, bool* idle) {
    check_process();
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait_for(lock, longest, [&] { return !outgoing_.empty() || n_live_ == 0; });
    *idle = outgoing_.empty() && n_live_ == 0;
    n_live_ -= std::count_if(outgoing_.begin(), outgoing_.end(), has_ended);
    return std::exchange(outgoing_, {});
}

Scheduler::Stats Background::stats() {
    const Visit visit(*this);
    Scheduler::Stats stats = scheduler_.stats();
    const std::lock_guard<std::mutex> lock(mutex_);
    stats.n_live = n_live_;  // with those that it has not seen, and those whose end nobody has
    return stats;
}

std::string Background::save(const Request& request, bool with_cache) {
    const Visit visit(*this);
    const ActingFor acting(this);
    return tinyllama::save(request, with_cache);
}

void Background::run() {
    const ActingFor acting(this);
    std::unique_lock<std::mutex> lock(mutex_);
    while (!stopping_.load()) {
        if (n_visitors_ > 0) {
            changed_.wait(lock);
            continue;
        }
        work(lock);
    }
}

// One step, and sleep where it found nothing to do.
void Background::work(std::unique_lock<std::mutex>& lock) {
    woken_ = false;
    const std::vector<std::shared_ptr<Request>> incoming = std::exchange(incoming_, {});
    lock.unlock();
    bool idle = false;
    Clock::time_point deadline = Clock::time_point::max();
    const auto hand_out = [&](const std::vector<Event>& events) {
        idle = events.empty();
        deliver(events);
    };
    {
        const std::lock_guard<std::mutex> working(working_);
        for (const auto& request : incoming)
            take_in(request);
        try {
            const auto check = [this] {
                if (stopping_.load()) throw Stopped();
            };
            scheduler_.step(check, hand_out);
            if (idle) deadline = scheduler_.next_deadline();
        } catch (const Stopped&) {
        } catch (...) {
            scheduler_.end_all(Ending::error, std::current_exception(), hand_out);
        }
    }
    lock.lock();
    const auto is_awake = [this] { return woken_ || stopping_.load() || n_visitors_ > 0; };
    if (!idle || is_awake()) return;
    if (deadline == Clock::time_point::max()) {
        changed_.wait(lock, is_awake);
    } else {
        changed_.wait_until(lock, deadline, is_awake);
    }
}

void Background::take_in(const std::shared_ptr<Request>& request) {
    try {
        scheduler_.submit(request);
    } catch (...) {
        request->conclude(Ending::error, std::current_exception());
        deliver({{request, -1}});
    }
}

// A session is free before it is known that its request has ended.
void Background::deliver(const std::vector<Event>& events) {
    std::vector<Outcome> outcomes = by_request(events);
    for (const Outcome& outcome : outcomes)
        if (has_ended(outcome)) let_go(outcome.request->session());
    const std::lock_guard<std::mutex> lock(mutex_);
    std::move(outcomes.begin(), outcomes.end(), std::back_inserter(outgoing_));
    if (!events.empty()) changed_.notify_all();
}

}  // namespace tinyllama

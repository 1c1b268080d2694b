// A scheduler on a thread of its own, which works while there is something to do, and sleeps
// otherwise.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "scheduler.h"

namespace tinyllama {

// All of it is for any thread. It uses the cores that the model was opened with, its own thread
// included. A session is in its hands until its request has ended: others get Error(busy).
class Background {
public:
    // See Scheduler. Throws std::bad_alloc, and Error(io_error) when no thread can be started.
    Background(const std::shared_ptr<const Model>& model, std::int64_t max_live,
               std::int64_t n_positions);
    // Not in a process that was forked from the one that made this: see is_of_this_process().
    ~Background() { stop(); }
    Background(const Background&) = delete;
    Background& operator=(const Background&) = delete;

    // In a forked process the thread is missing, and what it waited for cannot be destroyed: the
    // object has to be left alone there.
    bool is_of_this_process() const;

    // Stops before the next piece of work, for good; what has not ended is cancelled.
    void stop();

    // Throws what Scheduler::submit does, and Error(busy) for a session in use, or in a process
    // that was forked from the one that made this.
    void submit(std::shared_ptr<Request> request);
    // Something may be to do again: a request was cancelled or resumed.
    void wake();

    // What has come since the last call. Waits for something to come, but not for longer than
    // that, and not where nothing can come: then `idle` is true.
    std::vector<Outcome> take(Seconds longest, bool* idle);

    Scheduler::Stats stats();
    // See save() in save.h: between two pieces of work.
    std::string save(const Request& request, bool with_cache);

private:
    class Visit;
    void run();
    void work(std::unique_lock<std::mutex>& lock);
    void take_in(const std::shared_ptr<Request>& request);
    void deliver(const std::vector<Event>& events);
    void check_process() const;

    Scheduler scheduler_;
    std::shared_ptr<const Model> model_;
    int process_;
    std::mutex working_;  // held while the scheduler is used
    std::mutex mutex_;    // guards what follows
    std::condition_variable changed_;
    std::vector<std::shared_ptr<Request>> incoming_;
    std::vector<Outcome> outgoing_;
    std::int64_t n_live_ = 0;  // whose end was not taken yet
    int n_visitors_ = 0;
    bool woken_ = false;
    std::atomic<bool> stopping_{false};
    std::thread thread_;
};

}  // namespace tinyllama

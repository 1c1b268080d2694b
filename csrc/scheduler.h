// Continuing many texts at once: one forward pass per token for all of them, under a time budget.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "costs.h"
#include "request.h"
#include "session.h"

namespace tinyllama {

// What became of a request: a token was drawn, or it ended.
struct Event {
    std::shared_ptr<Request> request;
    std::int32_t token;  // -1: it ended
};

// The same, for all that happened to a request together. Takes its text.
struct Outcome {
    std::shared_ptr<Request> request;
    std::string text;
    std::vector<std::int32_t> tokens;
    bool done = false;
};

// In the order in which something first became of each request.
std::vector<Outcome> by_request(const std::vector<Event>& events);

// What one thread uses at a time: a second one gets Error(busy).
class Turn {
public:
    explicit Turn(std::atomic<bool>& in_use) : in_use_(in_use) {
        if (in_use.exchange(true))
            throw Error(Status::busy, "the scheduler is in use by another thread");
    }
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;
    ~Turn() { in_use_.store(false); }

private:
    std::atomic<bool>& in_use_;
};

// Steps requests of one model together. Used by one thread at a time: a second one gets
// Error(busy). Work goes in flights: a pass over what the requests have not read, as many as fit,
// then a draw for each that has read all. A flight may stop after any of its pieces and go on in
// a later step. `check` is called between pieces and may throw to stop.
//
// Of requests with a common beginning one reads it, and the others share its keys and values: those
// of the request, going on or ended but still held by somebody, with the longest one.
class Scheduler {
public:
    using Check = std::function<void()>;

    // More than max_live requests wait until others have ended. `alone`: sessions of requests that
    // have ended are not looked at, as other threads may use them. Throws std::bad_alloc.
    explicit Scheduler(std::shared_ptr<const Model> model, std::int64_t max_live = 64,
                       bool alone = false);
    ~Scheduler();
    Scheduler(const Scheduler&) = delete;
    Scheduler& operator=(const Scheduler&) = delete;

    // Computes some passes over nothing, of one row and of more, so that the first step under a
    // budget knows what pieces cost, and threads and memory are there. Throws std::bad_alloc.
    void warm_up();

    // Takes and touches memory for the keys and values of n_positions, all requests together; none
    // that is taken later is given back as long as the scheduler lives. Throws std::bad_alloc.
    void reserve(std::int64_t n_positions);

    // Takes part from the next step on. Throws Error(invalid_argument) for a session of another
    // model, or one with a request here that has not ended.
    void submit(std::shared_ptr<Request> request);

    // Works for as long as the budget allows by what pieces of work have cost so far, and delivers
    // what came of it, in order, before another thread may step. A budget of 0 only ends what was
    // cancelled or is too late. What delivering takes is learnt, and budgets leave room for it.
    using Deliver = std::function<void(const std::vector<Event>&)>;
    void step(Seconds budget, const Check& check, const Deliver& deliver);

    // Works until some request has drawn a token or ended.
    void step(const Check& check, const Deliver& deliver);

    // Works until a request has ended, and returns those that have, in the order in which they
    // came. None when there is nothing to do.
    std::vector<std::shared_ptr<Request>> run(const Check& check);

    const std::shared_ptr<const Model>& model() const { return model_; }

    // Ends all requests.
    void end_all(Ending ending, const std::exception_ptr& error, const Deliver& deliver);

    Clock::time_point next_deadline();

    struct Stats {
        std::int64_t n_live = 0;     // requests that have not ended
        std::int64_t n_waiting = 0;  // of them, those that still read their prompt
        std::int64_t n_read = 0;     // tokens read since the beginning
        std::int64_t n_shared = 0;   // tokens not read, as another had read them
        std::int64_t n_drawn = 0;    // tokens drawn
        std::int64_t kv_bytes = 0;   // of keys and values in use, by all timelines of the model
        std::int64_t n_pieces = 0;   // pieces of work
        Seconds spent{0};            // in them
        Seconds next_piece{0};       // what the next is thought to cost; 0: nothing to do
    };
    Stats stats();

private:
    struct Part {
        std::shared_ptr<Request> request;
        std::size_t n_rows;
    };
    struct Foreseen {
        Seconds pass, dearest_piece;
    };

    bool work(Budget& budget, const Check& check);
    void wake_threads();
    void finish_step(const Deliver& deliver);
    bool begin_flight(Budget& budget);
    bool hold_elections(Budget& budget);
    void go_on_electing(const std::shared_ptr<Request>& request);
    void abandon();
    void leave(const Request& request);
    void choose(Budget& budget);
    std::int64_t take(const std::shared_ptr<Request>& request, std::int64_t n);
    std::shared_ptr<Request> find_source(const Request& request);
    std::shared_ptr<Request> find_reader(const std::shared_ptr<Request>& request, Budget& budget);
    bool share_beginning(Request& request, Budget& budget);
    Foreseen foresee(std::int64_t n_rows, std::int64_t n_positions) const;
    void doubt(std::int64_t n_rows, std::int64_t n_positions);
    void plan(Budget& budget);
    bool takes_part(const Part& part) const;
    bool fly(Budget& budget, const Check& check);
    void advance();
    bool draw(Budget& budget, const Check& check);
    void drop_undrawable();
    void take_in(const std::shared_ptr<Request>& request, const Draw& drawn);
    void worked(Seconds elapsed);
    void obey();
    void fail(const std::shared_ptr<Request>& request, std::exception_ptr error);
    void finish(const std::shared_ptr<Request>& request, Ending ending);
    void report(const std::shared_ptr<Request>& request);
    void announce(const std::shared_ptr<Request>& request);
    bool is_waited_for(const Request& source, const Request& request) const;
    static bool goes_on(const Request& request);
    static bool may_draw(const Request& request);
    static Wish wish_of(const Request& request);
    std::vector<std::shared_ptr<Request>> remove_ended();

    std::shared_ptr<const Model> model_;
    std::int64_t max_live_;
    bool alone_;
    bool keeps_memory_ = false;
    std::unique_ptr<Pass> pass_;
    Costs costs_;
    std::atomic<bool> in_use_{false};
    std::vector<std::shared_ptr<Request>> live_;
    std::vector<std::weak_ptr<Request>> known_;  // whose beginnings may be shared
    Seconds delivery_{0};                        // running mean
    std::uint64_t n_submitted_ = 0;
    std::uint64_t turn_ = 0;
    Stats stats_;

    // The flight: parts of the pass, then draws. Members, so that steps need no new memory.
    std::vector<Part> parts_;
    std::vector<Row> rows_;
    bool flying_ = false;
    std::vector<std::shared_ptr<Request>> drawing_;
    std::size_t n_drawn_ = 0;  // of drawing_
    std::vector<Draw> draws_;
    std::vector<std::shared_ptr<Request>> order_;
    std::vector<std::shared_ptr<Request>> scouts_;  // on their way to live_
    std::vector<SessionLock> locks_;
    std::vector<Work> pieces_;
    std::vector<Event> events_;
};

}  // namespace tinyllama

// Continuing many texts at once: one forward pass per token for all of them, under a time budget.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "costs.h"
#include "sampler.h"
#include "session.h"
#include "tokenizer.h"

namespace tinyllama {

// When a text ends, if the context is not full before.
struct Limits {
    std::optional<std::int32_t> max_new_tokens;
    std::int32_t min_new_tokens = 0;       // before this many, end tokens are not drawn
    std::vector<std::int32_t> end_tokens;  // end the text and are no part of it
    std::vector<std::string> stops;        // not empty; the text ends before the first of them
};

// Who comes first where not all fit: higher priority, then the earlier deadline, then who has
// waited longest. At its deadline a request ends.
struct Urgency {
    std::int32_t priority = 0;
    Clock::time_point deadline = Clock::time_point::max();
};

// A drawn token's log-probability under the model itself, and the likeliest tokens in its place.
struct TokenLogprob {
    std::int32_t token;
    double logprob;
    std::vector<std::pair<std::int32_t, double>> top;
};

enum class Ending : std::uint8_t { none, stop, length, cancelled, deadline, error };

// One text being continued: a session, and what was made of it. cancel(), pause() and resume() may
// be called by any thread; the rest by the one that steps.
class Request {
public:
    // Appends `prompt` to the session. `decoder` is the text so far. With n_top, every token's
    // log-probability is kept, and those of the n_top likeliest. Throws what Session::append does.
    Request(std::shared_ptr<Session> session, const std::vector<std::int32_t>& prompt,
            std::shared_ptr<StreamDecoder> decoder, const SamplingParams& params, Limits limits,
            std::optional<std::int32_t> n_top = std::nullopt, Urgency urgency = {});

    // The scheduler acts on these before its next piece of work. A paused request keeps its place;
    // what was half read of it is read again.
    void cancel() { wish_.store(Wish::end); }
    void pause();
    void resume();
    bool paused() const { return wish_.load() == Wish::pause; }

    const std::vector<std::int32_t>& tokens() const { return tokens_; }
    const std::vector<TokenLogprob>& logprobs() const { return logprobs_; }
    Ending ending() const { return ending_; }
    // Rethrows what made it end with Ending::error.
    void rethrow() const {
        if (error_ != nullptr) std::rethrow_exception(error_);
    }
    // What is certain of the text, whole characters, and the part of it not taken before: what may
    // become a stop string is held back.
    std::string_view text() const { return std::string_view(text_).substr(0, n_certain_); }
    std::string_view take_text();

private:
    friend class Scheduler;
    enum class Wish : std::uint8_t { run, pause, end };

    Draw next_draw() const;
    void accept(std::int32_t token);
    void append(std::string_view piece);
    void end(Ending ending);

    std::shared_ptr<Session> session_;
    std::shared_ptr<StreamDecoder> decoder_;
    SamplingParams params_;
    SamplingParams early_params_;  // of the first min_new_tokens
    Limits limits_;
    std::optional<std::int32_t> n_top_;
    Urgency urgency_;
    std::int64_t room_;  // for new tokens
    std::vector<std::int32_t> tokens_;
    std::vector<TokenLogprob> logprobs_;
    std::string text_;
    std::size_t n_certain_ = 0;  // bytes of text_
    std::size_t n_taken_ = 0;
    Ending ending_ = Ending::none;
    std::exception_ptr error_;
    std::atomic<Wish> wish_{Wish::run};
    std::uint64_t id_ = 0;  // in the order of submission
    std::uint64_t last_turn_ = 0;
    bool announced_ = false;  // that it ended
};

// What became of a request: a token was drawn, or it ended.
struct Event {
    std::shared_ptr<Request> request;
    std::int32_t token;  // -1: it ended
};

// Steps requests of one model together. Used by one thread at a time: a second one gets
// Error(busy). Work goes in flights: a pass over what the requests have not read, as many as fit,
// then a draw for each that has read all. A flight may stop after any of its pieces and go on in
// a later step. `check` is called between pieces and may throw to stop.
class Scheduler {
public:
    using Check = std::function<void()>;

    // More than max_live requests wait until others have ended. Memory for the keys and values of
    // n_positions, all requests together, is taken and touched now; none that is taken later is
    // given back as long as the scheduler lives. Throws std::bad_alloc.
    explicit Scheduler(std::shared_ptr<const Model> model, std::int64_t max_live = 64,
                       std::int64_t n_positions = 0);
    ~Scheduler();
    Scheduler(const Scheduler&) = delete;
    Scheduler& operator=(const Scheduler&) = delete;

    // Computes some passes over nothing, of one row and of more, so that the first step under a
    // budget knows what pieces cost, and threads and memory are there. Throws std::bad_alloc.
    void warm_up();

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

    struct Stats {
        std::int64_t n_live = 0;     // requests that have not ended
        std::int64_t n_waiting = 0;  // of them, those that still read their prompt
        std::int64_t n_read = 0;     // tokens read since the beginning
        std::int64_t n_drawn = 0;    // tokens drawn
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
    struct Budget;
    class Turn;

    bool work(Budget& budget, const Check& check);
    void wake_threads();
    void finish_step(const Deliver& deliver);
    bool begin_flight(Budget& budget);
    void abandon();
    void leave(const Request& request);
    void choose(Budget& budget);
    std::int64_t take(const std::shared_ptr<Request>& request, std::int64_t n);
    Foreseen foresee(std::int64_t n_rows, std::int64_t n_positions) const;
    void doubt(std::int64_t n_rows, std::int64_t n_positions);
    void plan(Budget& budget);
    bool fly(Budget& budget, const Check& check);
    void advance();
    bool draw(Budget& budget, const Check& check);
    void drop_undrawable();
    void take_in(const std::shared_ptr<Request>& request, const Draw& drawn);
    void worked(Seconds elapsed);
    void obey();
    void fail(const std::shared_ptr<Request>& request, std::exception_ptr error);
    void finish(const std::shared_ptr<Request>& request, Ending ending);
    void announce(const std::shared_ptr<Request>& request);
    bool may_draw(const Request& request) const;
    std::vector<std::shared_ptr<Request>> remove_ended();

    std::shared_ptr<const Model> model_;
    std::int64_t max_live_;
    std::unique_ptr<Pass> pass_;
    Costs costs_;
    std::atomic<bool> in_use_{false};
    std::vector<std::shared_ptr<Request>> live_;
    Seconds delivery_{0};  // running mean
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
    std::vector<SessionLock> locks_;
    std::vector<Work> pieces_;
    std::vector<Event> events_;
};

}  // namespace tinyllama

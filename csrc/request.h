// One text being continued: how its tokens are drawn, what they make, and when it ends.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "constraint.h"
#include "costs.h"
#include "election.h"
#include "sampler.h"
#include "session.h"
#include "tokenizer.h"

namespace tinyllama {

// What to do when the context is full, or a prompt does not fit into it.
enum class Overflow : std::uint8_t {
    stop,      // the text ends; no prompt is cut
    shift,     // half of it is dropped, the oldest but for the first n_keep tokens, the rest read
               // again, and the text goes on
    truncate,  // of a prompt as much is dropped, the oldest but for the first n_keep, as makes room
               // for max_new_tokens, or for half of the context; then the text ends
    error,     // the text ends with Error(context_full)
};

// When a text ends.
struct Limits {
    std::optional<std::int32_t> max_new_tokens;
    std::int32_t min_new_tokens = 0;       // before this many, end tokens are not drawn
    std::vector<std::int32_t> end_tokens;  // end the text and are no part of it
    std::vector<std::string> stops;        // not empty; the text ends before the first of them
    Overflow on_overflow = Overflow::stop;
    std::int32_t n_keep = 1;
};

// What a text has to be: one of some choices, or what somebody else's constraint says, which was
// made from these texts.
struct Form {
    std::string kind;  // "": anything; "choices"; else a name that the other knows
    std::vector<std::string> texts;
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

// What it was told last.
enum class Wish : std::uint8_t { run, pause, end };

// All there is to a request beside its session; what its tokens made is found by decoding them.
struct RequestState {
    SamplingParams params;
    Limits limits;
    Form form;
    std::int32_t priority = 0;
    std::optional<Seconds> time_left;  // to the deadline
    std::string pending;               // of the decoder before tokens, and
    bool at_start = false;             // whether the text was at its start
    std::int64_t n_forgotten = 0;      // tokens drawn before
    std::vector<std::int32_t> tokens;  // drawn since
    std::size_t n_taken = 0;           // bytes of the text that were taken
    Ending ending = Ending::none;
    std::size_t n_reported = 0;  // tokens of which there were events
    Wish wish = Wish::run;
};

// One text being continued: a session, and what was made of it. What others see of it, and
// cancel(), pause() and resume(), are for any thread; the session for the one that steps.
class Request {
public:
    // `prompt` is appended to the session when it is submitted. `decoder` is the text so far. With
    // n_top, every token's log-probability is kept, and those of the n_top likeliest. `constraint`
    // is needed for a form of another kind than choices. Throws Error(invalid_argument) for options
    // out of range.
    Request(std::shared_ptr<Session> session, const std::vector<std::int32_t>& prompt,
            std::shared_ptr<StreamDecoder> decoder, const SamplingParams& params, Limits limits,
            std::optional<std::int32_t> n_top = std::nullopt, Urgency urgency = {}, Form form = {},
            std::unique_ptr<Constraint> constraint = nullptr);

    // One that goes on where another was when its state was taken, log-probabilities left out. The
    // session is as it was, too. Throws Error(format_error) for a state that no request has.
    Request(std::shared_ptr<Session> session, const RequestState& state,
            std::unique_ptr<Constraint> constraint = nullptr);
    RequestState state() const;

    // A request in the election that this one holds: it begins as this one goes on, with a token,
    // writes what its constraint says, and keeps the log-probabilities.
    std::shared_ptr<Request> scout(std::int32_t first, std::unique_ptr<Constraint> rest) const;

    // Appends the prompt, and what has to follow it; nothing the second time. Throws what
    // Session::append does, and nothing is changed; of what goes wrong later the request ends.
    void begin();
    Session& session() const { return *session_; }
    const std::shared_ptr<StreamDecoder>& decoder() const { return decoder_; }

    // The scheduler acts on these before its next piece of work. A paused request keeps its place;
    // what was half read of it is read again.
    void cancel() { wish_.store(Wish::end); }
    void pause();
    void resume();
    bool paused() const { return wish_.load() == Wish::pause; }

    std::vector<std::int32_t> tokens() const;
    std::vector<TokenLogprob> logprobs() const;
    Ending ending() const;
    // Rethrows what made it end with Ending::error.
    void rethrow() const;
    // What is certain of the text, whole characters, and the part of it not taken before: what may
    // become a stop string is held back.
    std::string text() const;
    void take_text(std::string* text);  // appends to it

    // Lets go of what was taken and of tokens of which there were events, so that a text without an
    // end takes no more memory than a short one. Forms need what they wrote, and keep it.
    void forget();

    // Ends it, unless it has ended.
    void conclude(Ending ending, std::exception_ptr error = nullptr);

private:
    friend class Scheduler;
    Draw next_draw() const;
    std::int64_t n_drawn() const {
        return n_forgotten_ + static_cast<std::int64_t>(tokens_.size());
    }
    void prepare();
    void append_prompt();
    bool make_room(std::int32_t n_wanted = 1);
    void accept(std::int32_t token);
    void add(std::int32_t token);
    void constrain();
    bool make_room_for_election();
    void elect();
    void finish_text();
    void append(std::string_view piece);
    void end(Ending ending);

    std::shared_ptr<Session> session_;
    std::vector<std::int32_t> prompt_;
    bool begun_ = false;
    std::shared_ptr<StreamDecoder> decoder_;
    StreamDecoder first_decoder_;  // as it was before the first of tokens_
    SamplingParams params_;
    SamplingParams early_params_;  // of the first min_new_tokens
    Limits limits_;
    std::optional<std::int32_t> n_top_;
    Urgency urgency_;
    Form form_;
    mutable std::mutex mutex_;  // guards what follows, but for reads by the thread that steps
    std::unique_ptr<Election> election_;  // until one of the choices is drawn
    std::unique_ptr<Constraint> constraint_;
    Allowed allowed_;                   // by the constraint, with end tokens where it may end
    std::vector<std::int32_t> forced_;  // tokens that follow before anything is drawn
    std::int64_t n_forgotten_ = 0;
    std::vector<std::int32_t> tokens_;
    std::vector<TokenLogprob> logprobs_;
    std::string text_;
    std::size_t n_certain_ = 0;  // bytes of text_
    std::size_t n_taken_ = 0;
    Ending ending_ = Ending::none;
    std::exception_ptr error_;
    std::atomic<Wish> wish_{Wish::run};
    std::uint64_t id_ = 0;         // in the order of submission
    std::uint64_t last_turn_ = 0;  // in which it took part, and
    std::uint64_t admitted_ = 0;   // in which it could have
    bool is_scout_ = false;
    std::weak_ptr<Request> elector_;   // who sent this scout
    std::shared_ptr<Request> source_;  // has the same beginning, and has read it or will before
    std::size_t n_reported_ = 0;       // tokens of which there were events
    bool announced_ = false;           // that it ended
};

}  // namespace tinyllama

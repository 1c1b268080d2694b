// Continuing many texts at once: one forward pass per token for all of them.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

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

// A drawn token's log-probability under the model itself, and the likeliest tokens in its place.
struct TokenLogprob {
    std::int32_t token;
    double logprob;
    std::vector<std::pair<std::int32_t, double>> top;
};

enum class Ending : std::uint8_t { none, stop, length };

// One text being continued: a session, the tokens it has still to read, and what was made of them.
class Request {
public:
    // `decoder` is the text so far. With n_top, every token's log-probability is kept, and those of
    // the n_top likeliest. Throws Error(busy) when the session is.
    Request(std::shared_ptr<Session> session, std::vector<std::int32_t> prompt,
            std::shared_ptr<StreamDecoder> decoder, const SamplingParams& params, Limits limits,
            std::optional<std::int32_t> n_top);

    const std::vector<std::int32_t>& tokens() const { return tokens_; }
    const std::vector<TokenLogprob>& logprobs() const { return logprobs_; }
    Ending ending() const { return ending_; }
    // What is certain of the text, whole characters, and the part of it not taken before: what may
    // become a stop string is held back.
    std::string_view text() const { return std::string_view(text_).substr(0, n_certain_); }
    std::string_view take_text();

private:
    friend class Scheduler;

    Draw next_draw() const;
    void accept(std::int32_t token);
    void append(std::string_view piece);
    void end(Ending ending);

    std::shared_ptr<Session> session_;
    std::vector<std::int32_t> unread_;  // the prompt, then the token drawn last
    std::shared_ptr<StreamDecoder> decoder_;
    SamplingParams params_;
    SamplingParams early_params_;  // of the first min_new_tokens
    Limits limits_;
    std::optional<std::int32_t> n_top_;
    std::int64_t room_;  // for new tokens
    std::vector<std::int32_t> tokens_;
    std::vector<TokenLogprob> logprobs_;
    std::string text_;
    std::size_t n_certain_ = 0;  // bytes of text_
    std::size_t n_taken_ = 0;
    Ending ending_ = Ending::none;
};

// Steps requests of one model together. Used by one thread at a time. `check` is called between
// pieces of work and may throw to stop; whatever is thrown, every session is as after its last
// pass.
class Scheduler {
public:
    using Check = std::function<void()>;

    // Takes part from the next step on, which reads its prompt.
    void submit(std::shared_ptr<Request> request) { live_.push_back(std::move(request)); }

    // One token for each request. Afterwards every session holds all that was drawn for it: it may
    // be read, forked, fed or left at any time. Requests that ended leave.
    void step(const Check& check);

    // Steps until a request has ended. Those that have leave and are returned, in the order in
    // which they came; their sessions may lack the last token. None when there is nothing to do.
    std::vector<std::shared_ptr<Request>> run(const Check& check);

private:
    void read(const Check& check);
    void draw();
    std::vector<std::shared_ptr<Request>> remove_ended();

    std::vector<std::shared_ptr<Request>> live_;
    // Of one pass; members, so that steps need no new memory.
    std::vector<Feed> feeds_;
    std::vector<Draw> draws_;
    std::vector<Request*> drawing_;
};

}  // namespace tinyllama

// A session: one timeline of tokens, with its cache, its next logits and its random state.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <vector>

#include "forward.h"
#include "kv_cache.h"
#include "model.h"
#include "sampler.h"

namespace tinyllama {

struct Draw;
struct Feed;

class Session {
public:
    Session(std::shared_ptr<const Model> model, std::uint64_t seed);

    const Model& model() const { return *model_; }
    std::uint64_t seed() const { return random_.seed; }
    std::vector<std::int32_t> tokens();
    std::int32_t n_tokens();

    // Logits (vocab_size) after the last token. Throws Error(invalid_argument) when there is none.
    std::vector<float> logits();
    // Draws the next token without feeding it. `text`: see sample() in sampler.h; `before`: gets
    // the random state as it was.
    std::int32_t sample(const SamplingParams& params, const StreamDecoder* text = nullptr,
                        RandomState* before = nullptr);
    // Natural logarithm of the probability of `token` as the next one, under the unmodified
    // distribution.
    double log_probability(std::int32_t token);
    std::vector<std::pair<std::int32_t, double>> top_log_probabilities(std::int32_t n);

    // Keeps the first n_tokens.
    void rewind(std::int32_t n_tokens);
    // A copy with the same past and a random state of its own.
    std::shared_ptr<Session> fork(std::uint64_t seed);

private:
    friend class SessionLock;
    friend class FeedTransaction;
    friend void sample_each(std::vector<Draw>& draws);
    friend void feed(const std::vector<Feed>& feeds, const std::function<void()>& between_chunks,
                     const Tap* tap);

    void compute_missing_logits();

    std::shared_ptr<const Model> model_;
    std::vector<std::int32_t> tokens_;
    KvCache cache_;
    Logits logits_;
    bool logits_valid_ = false;  // false after a rewind, until the last token is computed again
    RandomState random_;
    std::atomic<bool> in_use_{false};
};

// How one session draws its next token (see Session::sample), and what came of it.
struct Draw {
    Session* session;
    const SamplingParams* params;
    const StreamDecoder* text;
    std::int32_t token = -1;
    std::exception_ptr error = nullptr;
    RandomState before = {};  // of the session
};

// Draws from many sessions, each once, side by side on the threads of the first one's model. Throws
// what the first of them to fail throws; then every random state is as it was.
void sample_each(std::vector<Draw>& draws);

// Tokens that somebody else keeps alive.
struct TokenSpan {
    TokenSpan(const std::vector<std::int32_t>& tokens) : data(tokens.data()), size(tokens.size()) {}
    const std::int32_t* begin() const { return data; }
    const std::int32_t* end() const { return data + size; }
    const std::int32_t* data;
    std::size_t size;
};

// Tokens to append to one session.
struct Feed {
    Session* session;
    TokenSpan tokens;
    float* all_logits;  // (tokens.size, vocab_size) out, or null
};

// Appends tokens to sessions of one model as one batch, cut into chunks where it is long;
// between_chunks may throw to stop. Throws Error before anything changes: invalid_argument for a
// token outside the vocabulary, a session named twice or of another model; context_full; busy.
// Whatever is thrown later (nonfinite logits, a stop) leaves every session as it was.
void feed(const std::vector<Feed>& feeds, const std::function<void()>& between_chunks,
          const Tap* tap = nullptr);

// Appends tokens to one session and returns, for each, the logarithm of its probability given all
// before it: NaN for the first token of an empty session.
std::vector<double> score(Session& session, const std::vector<std::int32_t>& tokens,
                          const std::function<void()>& between_chunks);

}  // namespace tinyllama

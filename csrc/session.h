// A session: one timeline of tokens, with its cache, its next logits and its random state. Tokens
// may be there before the model has read them: what needs their logits reads them first.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "forward.h"
#include "kv_cache.h"
#include "model.h"
#include "sampler.h"
#include "status.h"

namespace tinyllama {

struct Draw;
struct Feed;

// Reads rows in one pass. Throws Error(nonfinite) when a logit asked for is not a finite number.
void read_rows(const Model& model, const std::vector<Row>& rows, const Tap* tap = nullptr,
               F32Products f32 = F32Products::in_order);

// Rows computed together: enough to read each weight once for many, small enough for the caches.
constexpr std::size_t max_rows = 256;

// Tokens that somebody else keeps alive.
struct TokenSpan {
    TokenSpan(const std::vector<std::int32_t>& tokens) : data(tokens.data()), size(tokens.size()) {}
    TokenSpan(const std::int32_t* tokens, std::size_t n) : data(tokens), size(n) {}
    const std::int32_t* begin() const { return data; }
    const std::int32_t* end() const { return data + size; }
    const std::int32_t* data;
    std::size_t size;
};

class Session {
public:
    Session(std::shared_ptr<const Model> model, std::uint64_t seed);

    const Model& model() const { return *model_; }
    std::uint64_t seed() const { return random_.seed; }
    std::vector<std::int32_t> tokens();
    bool has_tokens(const std::vector<std::int32_t>& tokens);
    std::int32_t n_tokens();
    std::int32_t n_unread();

    // Logits (vocab_size) after the last token. Throws Error(invalid_argument) when there is none.
    std::vector<float> logits();
    // Draws the next token without appending it. `text` and `allowed`: see sample() in sampler.h.
    // When it throws, the random state is as it was.
    std::int32_t sample(const SamplingParams& params, const StreamDecoder* text = nullptr,
                        const std::vector<std::int32_t>* allowed = nullptr);
    // Natural logarithm of the probability of `token` as the next one, under the unmodified
    // distribution.
    double log_probability(std::int32_t token);
    std::vector<double> log_probabilities(const std::vector<std::int32_t>& tokens);
    // Draws one of several texts: see sample_one_of() in sampler.h.
    std::size_t sample_one_of(const std::vector<double>& scores, const SamplingParams& params);
    std::vector<std::pair<std::int32_t, double>> top_log_probabilities(std::int32_t n);

    // Appends tokens, unread. Throws Error before anything changes: invalid_argument for one
    // outside the vocabulary, context_full, busy.
    void append(TokenSpan tokens);
    // The same, but of all tokens then there only the first n_first stay, and of the others the
    // newest, n_most all together: never context_full, for n_most within it.
    void append(TokenSpan tokens, std::size_t n_first, std::size_t n_most);
    // Throws what append() would, but for busy.
    void check(const std::int32_t* tokens, std::size_t n) const;
    // Keeps the first n_tokens.
    void rewind(std::int32_t n_tokens);
    // Gives the memory of keys, values and logits back. All is read again when it is needed.
    void drop_cache();
    // A copy with the same past and a random state of its own.
    std::shared_ptr<Session> fork(std::uint64_t seed);
    // One with the same tokens, of which nothing is read.
    std::shared_ptr<Session> unread_copy();

private:
    friend void hold(Session& session, const void* holder);
    friend void let_go(Session& session);
    friend void draw_each(std::vector<Draw>& draws);
    friend class SavedSession;
    friend class SessionGlance;
    friend class SessionLock;
    friend class FeedTransaction;
    friend class Scheduler;
    friend void feed(const std::vector<Feed>& feeds, const std::function<void()>& between_chunks,
                     const Tap* tap);

    void check_vocabulary(const std::int32_t* tokens, std::size_t n) const;
    std::size_t unread() const { return tokens_.size() - n_read_; }
    void leave_pass();
    // Appends rows that read the next n unread tokens; once they are computed, has_read(n).
    void add_rows(std::size_t n, std::vector<Row>* rows);
    void has_read(std::size_t n) { n_read_ += n; }
    // Throws Error(nonfinite), and forgets the last token's logits, if one is not a finite number.
    void refuse_nonfinite_logits();
    std::int32_t draw(const SamplingParams& params, const StreamDecoder* text,
                      const std::vector<std::int32_t>* allowed);
    void keep(std::size_t n_tokens);
    // How many first tokens are also those of another; never all, so that the last is still read.
    std::size_t n_in_common_with(const Session& other) const;
    // Takes over what another has read of the first n tokens, which both have in common.
    void share_beginning(Session& other, std::size_t n);
    void read_all();

    std::shared_ptr<const Model> model_;
    std::vector<std::int32_t> tokens_;
    std::size_t n_read_ = 0;  // of tokens_; logits_ are those after the last when all are read
    KvCache cache_;
    Logits logits_;
    RandomState random_;
    bool in_other_hands() const;

    Pass* pass_ = nullptr;  // that has rows of this session, and is not over
    enum class Use : std::uint8_t { none, lock, glance };
    std::atomic<Use> use_{Use::none};
    std::atomic<const void*> holder_{nullptr};
};

// Gives a session into somebody's hands: from then on threads get an error unless they act for him.
// Throws Error(busy) for one that is in use.
void hold(Session& session, const void* holder);
void let_go(Session& session);

// For as long as it lives, this thread acts for him.
class ActingFor {
public:
    explicit ActingFor(const void* holder);
    ActingFor(const ActingFor&) = delete;
    ActingFor& operator=(const ActingFor&) = delete;
    ~ActingFor();

private:
    const void* before_;
};

// Sessions are used by one thread at a time; a second one gets an error, not corruption.
class SessionLock {
public:
    explicit SessionLock(Session& session);
    SessionLock(SessionLock&& other) noexcept : session_(std::exchange(other.session_, nullptr)) {}
    SessionLock(const SessionLock&) = delete;
    SessionLock& operator=(const SessionLock&) = delete;
    ~SessionLock() {
        if (session_ != nullptr) session_->use_.store(Session::Use::none);
    }

private:
    Session* session_;
};

// A short look at a session that another thread may want: it waits then, and gets no error.
class SessionGlance {
public:
    explicit SessionGlance(Session& session);
    SessionGlance(const SessionGlance&) = delete;
    SessionGlance& operator=(const SessionGlance&) = delete;
    ~SessionGlance() {
        if (owns_) session_.use_.store(Session::Use::none);
    }
    bool owns() const { return owns_; }

private:
    Session& session_;
    bool owns_;
};

// How one session draws its next token (see Session::sample), and what came of it.
struct Draw {
    Session* session;
    const SamplingParams* params;
    const StreamDecoder* text;
    const std::vector<std::int32_t>* allowed;
    std::int32_t token = -1;
    std::exception_ptr error = nullptr;
    std::optional<SessionLock> lock = std::nullopt;
};

// Draws from many sessions of one model, each once, side by side on its threads. Nothing is thrown:
// each draw has a token or an error.
void draw_each(std::vector<Draw>& draws);

// Tokens to append to one session.
struct Feed {
    Session* session;
    TokenSpan tokens;
    float* all_logits;            // (tokens.size, vocab_size) out, or null
    Excerpt* excerpts = nullptr;  // (tokens.size) out, or null
};

// Appends tokens to sessions of one model as one batch, cut into chunks where it is long;
// between_chunks may throw to stop. Throws Error before anything changes: invalid_argument for a
// token outside the vocabulary, a session named twice or of another model; context_full; busy.
// Whatever is thrown later (nonfinite logits, a stop) leaves every session as it was.
void feed(const std::vector<Feed>& feeds, const std::function<void()>& between_chunks,
          const Tap* tap = nullptr);

}  // namespace tinyllama

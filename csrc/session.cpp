#include "session.h"

#include <algorithm>
#include <cmath>
#include <exception>
#include <limits>
#include <string>
#include <utility>

#include "parallel.h"

namespace tinyllama {

// Rows computed together: enough to read each weight once for many, small enough for the caches.
constexpr std::size_t max_rows = 256;

// Sessions are used by one thread at a time; a second one gets an error, not corruption.
class SessionLock {
public:
    explicit SessionLock(Session& session) : session_(&session) {
        if (session.in_use_.exchange(true)) {
            session_ = nullptr;
            throw Error(Status::busy, "the session is in use by another thread");
        }
    }
    SessionLock(SessionLock&& other) noexcept : session_(std::exchange(other.session_, nullptr)) {}
    SessionLock(const SessionLock&) = delete;
    SessionLock& operator=(const SessionLock&) = delete;
    ~SessionLock() {
        if (session_ != nullptr) session_->in_use_.store(false);
    }

private:
    Session* session_;
};

namespace {

class BorrowedWorkspace {
public:
    explicit BorrowedWorkspace(const Model& model)
        : model_(model), workspace_(model.borrow_workspace()) {}
    BorrowedWorkspace(const BorrowedWorkspace&) = delete;
    BorrowedWorkspace& operator=(const BorrowedWorkspace&) = delete;
    ~BorrowedWorkspace() { model_.return_workspace(std::move(workspace_)); }
    Workspace& operator*() { return *workspace_; }

private:
    const Model& model_;
    std::unique_ptr<Workspace> workspace_;
};

// Names the first logit that is not a finite number, if there is one.
void refuse_nonfinite(const Model& model, const float* logits, std::int32_t pos) {
    const std::int32_t vocab_size = model.config().vocab_size;
    for (std::int32_t i = 0; i < vocab_size; ++i) {
        if (std::isfinite(logits[i])) continue;
        throw Error(Status::nonfinite, model.name() + ": the logit of token " + std::to_string(i) +
                                           " at position " + std::to_string(pos) +
                                           " is not finite");
    }
}

void check_tokens(const Feed& feed, std::size_t n_before) {
    const Model& model = feed.session->model();
    const std::int32_t vocab_size = model.config().vocab_size;
    for (const std::int32_t token : feed.tokens) {
        if (token < 0 || token >= vocab_size) {
            throw Error(Status::invalid_argument,
                        "token " + std::to_string(token) + " is outside the " +
                            std::to_string(vocab_size) + " tokens of " + model.name());
        }
    }
    const auto room = static_cast<std::size_t>(model.config().max_seq_len) - n_before;
    if (feed.tokens.size > room) {
        throw Error(Status::context_full, std::to_string(feed.tokens.size) +
                                              " tokens do not fit: the context of " +
                                              std::to_string(model.config().max_seq_len) +
                                              " tokens has room for " + std::to_string(room));
    }
}

}  // namespace

// Locks all sessions of a batch, and takes back what was added unless commit() is reached.
class FeedTransaction {
public:
    explicit FeedTransaction(const std::vector<Feed>& feeds) : feeds_(feeds) {
        const Model* model = &feeds.front().session->model();
        std::vector<const Session*> seen;
        for (const Feed& feed : feeds) {
            if (&feed.session->model() != model) {
                throw Error(Status::invalid_argument, "the sessions of a batch are of two models");
            }
            seen.push_back(feed.session);
        }
        std::sort(seen.begin(), seen.end());
        if (std::adjacent_find(seen.begin(), seen.end()) != seen.end()) {
            throw Error(Status::invalid_argument, "a session is named twice in one batch");
        }
        for (const Feed& feed : feeds)
            locks_.emplace_back(*feed.session);
        for (const Feed& feed : feeds) {
            n_before_.push_back(feed.session->tokens_.size());
            check_tokens(feed, n_before_.back());
        }
    }

    FeedTransaction(const FeedTransaction&) = delete;
    FeedTransaction& operator=(const FeedTransaction&) = delete;
    ~FeedTransaction() {
        if (committed_) return;
        for (std::size_t i = 0; i < n_before_.size(); ++i) {
            Session& session = *feeds_[i].session;
            if (session.tokens_.size() == n_before_[i]) continue;
            session.tokens_.resize(n_before_[i]);
            session.logits_valid_ = false;
        }
    }

    void commit() { committed_ = true; }

private:
    const std::vector<Feed>& feeds_;
    std::vector<SessionLock> locks_;
    std::vector<std::size_t> n_before_;
    bool committed_ = false;
};

Session::Session(std::shared_ptr<const Model> model, std::uint64_t seed)
    : model_(std::move(model)), cache_(model_->kv_layout()), random_{seed, 0} {}

std::vector<std::int32_t> Session::tokens() {
    const SessionLock lock(*this);
    return tokens_;
}

std::int32_t Session::n_tokens() {
    const SessionLock lock(*this);
    return static_cast<std::int32_t>(tokens_.size());
}

std::vector<float> Session::logits() {
    const SessionLock lock(*this);
    compute_missing_logits();
    return {logits_.values.begin(), logits_.values.begin() + model_->config().vocab_size};
}

std::int32_t Session::sample(const SamplingParams& params, const StreamDecoder* text,
                             RandomState* before) {
    const SessionLock lock(*this);
    if (before != nullptr) *before = random_;
    validate(params, model_->config().vocab_size);
    compute_missing_logits();
    return tinyllama::sample(model_->kernels(), logits_, tokens_, params, random_, text);
}

double Session::log_probability(std::int32_t token) {
    const SessionLock lock(*this);
    const std::int32_t vocab_size = model_->config().vocab_size;
    if (token < 0 || token >= vocab_size) {
        throw Error(Status::invalid_argument, "token " + std::to_string(token) +
                                                  " is outside the " + std::to_string(vocab_size) +
                                                  " tokens");
    }
    compute_missing_logits();
    return tinyllama::log_probability(model_->kernels(), logits_, token);
}

std::vector<std::pair<std::int32_t, double>> Session::top_log_probabilities(std::int32_t n) {
    const SessionLock lock(*this);
    compute_missing_logits();
    return tinyllama::top_log_probabilities(model_->kernels(), logits_, n);
}

// The last token is computed again: the promise of invariance makes its logits the same bits.
void Session::compute_missing_logits() {
    if (tokens_.empty()) {
        throw Error(Status::invalid_argument, "the session is empty: feed it a token first");
    }
    if (logits_valid_) return;
    logits_.resize(static_cast<std::size_t>(model_->config().vocab_size));
    BorrowedWorkspace workspace(*model_);
    const auto pos = static_cast<std::int32_t>(tokens_.size()) - 1;
    cache_.reserve(pos, pos + 1);
    const Row row{&cache_, pos, tokens_.back(), logits_.values.data(), logits_.maxima.data()};
    if (!forward(*model_, {row}, *workspace)) refuse_nonfinite(*model_, row.logits, pos);
    logits_valid_ = true;
}

void Session::rewind(std::int32_t n_tokens) {
    const SessionLock lock(*this);
    if (n_tokens < 0 || static_cast<std::size_t>(n_tokens) > tokens_.size()) {
        throw Error(Status::invalid_argument, "cannot rewind to " + std::to_string(n_tokens) +
                                                  " tokens: the session has " +
                                                  std::to_string(tokens_.size()));
    }
    if (static_cast<std::size_t>(n_tokens) == tokens_.size()) return;
    tokens_.resize(static_cast<std::size_t>(n_tokens));
    logits_valid_ = false;
}

std::shared_ptr<Session> Session::fork(std::uint64_t seed) {
    const SessionLock lock(*this);
    auto copy = std::make_shared<Session>(model_, seed);
    copy->tokens_ = tokens_;
    copy->cache_ = cache_.share(static_cast<std::int32_t>(tokens_.size()));
    copy->logits_ = logits_;
    copy->logits_valid_ = logits_valid_;
    return copy;
}

void feed(const std::vector<Feed>& feeds, const std::function<void()>& between_chunks,
          const Tap* tap) {
    if (feeds.empty()) return;
    FeedTransaction transaction(feeds);
    const Model& model = feeds.front().session->model();
    const auto vocab_size = static_cast<std::size_t>(model.config().vocab_size);
    BorrowedWorkspace workspace(model);
    std::vector<Row> rows;
    const auto flush = [&] {
        const bool all_finite = forward(model, rows, *workspace, tap);
        for (const Row& row : rows) {
            if (!all_finite && row.logits != nullptr) refuse_nonfinite(model, row.logits, row.pos);
        }
        rows.clear();
    };
    for (const Feed& feed : feeds) {
        Session& session = *feed.session;
        if (feed.tokens.size == 0) continue;
        const std::size_t n_before = session.tokens_.size();
        session.cache_.reserve(static_cast<std::int32_t>(n_before),
                               static_cast<std::int32_t>(n_before + feed.tokens.size));
        session.logits_.resize(vocab_size);
        for (std::size_t i = 0; i < feed.tokens.size; ++i) {
            rows.push_back({&session.cache_, static_cast<std::int32_t>(n_before + i),
                            feed.tokens.data[i], nullptr});
            if (feed.all_logits != nullptr) {
                rows.back().logits = feed.all_logits + i * vocab_size;
            } else if (i + 1 == feed.tokens.size) {
                rows.back().logits = session.logits_.values.data();
                rows.back().maxima = session.logits_.maxima.data();
            }
            session.tokens_.push_back(feed.tokens.data[i]);
            if (rows.size() == max_rows) {
                flush();
                between_chunks();
            }
        }
    }
    flush();
    for (const Feed& feed : feeds) {
        if (feed.tokens.size == 0) continue;
        if (feed.all_logits != nullptr) {
            const float* last = feed.all_logits + (feed.tokens.size - 1) * vocab_size;
            std::copy(last, last + vocab_size, feed.session->logits_.values.begin());
            feed.session->logits_.find_maxima();
        }
        feed.session->logits_valid_ = true;
    }
    transaction.commit();
}

void sample_each(std::vector<Draw>& draws) {
    if (draws.empty()) return;
    const Model& model = draws.front().session->model();
    const auto n = static_cast<std::int64_t>(draws.size());
    const bool little = n * model.config().vocab_size < (1 << 16);
    Threads& threads = model.threads();
    threads.parallel_for(little ? 1 : threads.size(), n, [&](std::int64_t begin, std::int64_t end) {
        for (auto i = static_cast<std::size_t>(begin); i < static_cast<std::size_t>(end); ++i) {
            Draw& draw = draws[i];
            try {
                draw.token = draw.session->sample(*draw.params, draw.text, &draw.before);
            } catch (...) {
                draw.error = std::current_exception();
            }
        }
    });
    for (const Draw& failed : draws) {
        if (failed.error == nullptr) continue;
        for (const Draw& draw : draws) {
            if (draw.error == nullptr) draw.session->random_ = draw.before;
        }
        std::rethrow_exception(failed.error);
    }
}

std::vector<double> score(Session& session, const std::vector<std::int32_t>& tokens,
                          const std::function<void()>& between_chunks) {
    const std::int32_t vocab_size = session.model().config().vocab_size;
    const KernelTable& kernels = session.model().kernels();
    const auto n_logits = static_cast<std::size_t>(vocab_size);
    std::vector<double> scores(tokens.size(), std::numeric_limits<double>::quiet_NaN());
    if (tokens.empty()) return scores;
    const std::int32_t n_before = session.n_tokens();
    if (n_before > 0 && tokens[0] >= 0 && tokens[0] < vocab_size) {
        scores[0] = session.log_probability(tokens[0]);
    }
    check_tokens({&session, tokens, nullptr}, static_cast<std::size_t>(n_before));
    std::vector<float> logits(std::min(tokens.size(), max_rows) * n_logits);
    Logits one;
    one.resize(n_logits);
    try {
        for (std::size_t begin = 0; begin < tokens.size(); begin += max_rows) {
            const std::size_t end = std::min(tokens.size(), begin + max_rows);
            const auto at = [&](std::size_t i) {
                return tokens.begin() + static_cast<std::ptrdiff_t>(i);
            };
            const std::vector<std::int32_t> chunk(at(begin), at(end));
            feed({{&session, chunk, logits.data()}}, between_chunks);
            for (std::size_t i = begin + 1; i < std::min(tokens.size(), end + 1); ++i) {
                const float* row = logits.data() + (i - 1 - begin) * n_logits;
                std::copy(row, row + n_logits, one.values.begin());
                one.find_maxima();
                scores[i] = log_probability(kernels, one, tokens[i]);
            }
            between_chunks();
        }
    } catch (...) {
        session.rewind(n_before);
        throw;
    }
    return scores;
}

}  // namespace tinyllama

#include "session.h"

#include <algorithm>
#include <cmath>
#include <exception>
#include <string>
#include <thread>
#include <utility>

#include "parallel.h"

namespace tinyllama {

namespace {

class BorrowedPass {
public:
    explicit BorrowedPass(const Model& model) : model_(model), pass_(model.borrow_pass()) {}
    BorrowedPass(const BorrowedPass&) = delete;
    BorrowedPass& operator=(const BorrowedPass&) = delete;
    ~BorrowedPass() { model_.return_pass(std::move(pass_)); }
    Pass* operator->() { return pass_.get(); }

private:
    const Model& model_;
    std::unique_ptr<Pass> pass_;
};

// Names a logit that is not a finite number, or its position, if there is one.
void refuse_nonfinite(const Model& model, const Row& row) {
    const std::int32_t vocab_size = model.config().vocab_size;
    for (std::int32_t i = 0; row.logits != nullptr && i < vocab_size; ++i) {
        if (std::isfinite(row.logits[i])) continue;
        throw Error(Status::nonfinite, model.name() + ": the logit of token " + std::to_string(i) +
                                           " at position " + std::to_string(row.pos) +
                                           " is not finite");
    }
    if (row.excerpt != nullptr && !row.excerpt->all_finite()) {
        throw Error(Status::nonfinite, model.name() + ": a logit at position " +
                                           std::to_string(row.pos) + " is not finite");
    }
}

}  // namespace

void read_rows(const Model& model, const std::vector<Row>& rows, const Tap* tap, F32Products f32) {
    BorrowedPass pass(model);
    const bool all_finite = pass->run(rows, tap, f32);
    for (const Row& row : rows)
        if (!all_finite) refuse_nonfinite(model, row);
}

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
            feed.session->check(feed.tokens.data, feed.tokens.size);
        }
        for (const Feed& feed : feeds)
            feed.session->leave_pass();
    }

    FeedTransaction(const FeedTransaction&) = delete;
    FeedTransaction& operator=(const FeedTransaction&) = delete;
    ~FeedTransaction() {
        if (committed_) return;
        for (std::size_t i = 0; i < n_before_.size(); ++i) {
            feeds_[i].session->keep(n_before_[i]);
        }
    }

    void commit() { committed_ = true; }

private:
    const std::vector<Feed>& feeds_;
    std::vector<SessionLock> locks_;
    std::vector<std::size_t> n_before_;
    bool committed_ = false;
};

namespace {
thread_local const void* acting_for = nullptr;
}  // namespace

bool Session::in_other_hands() const {
    const void* const holder = holder_.load(std::memory_order_acquire);
    return holder != nullptr && holder != acting_for;
}

void hold(Session& session, const void* holder) {
    const SessionLock lock(session);
    session.holder_.store(holder, std::memory_order_release);
}

void let_go(Session& session) { session.holder_.store(nullptr, std::memory_order_release); }

SessionLock::SessionLock(Session& session) : session_(&session) {
    while (!session.in_other_hands()) {
        Session::Use seen = Session::Use::none;
        if (session.use_.compare_exchange_strong(seen, Session::Use::lock)) {
            if (!session.in_other_hands()) return;
            session.use_.store(Session::Use::none);
        }
        if (seen == Session::Use::lock) break;
        std::this_thread::yield();  // somebody glances at it
    }
    session_ = nullptr;
    throw Error(Status::busy, "the session is in use by another thread");
}

SessionGlance::SessionGlance(Session& session) : session_(session), owns_(false) {
    Session::Use none = Session::Use::none;
    owns_ = !session.in_other_hands() &&
            session.use_.compare_exchange_strong(none, Session::Use::glance);
}

ActingFor::ActingFor(const void* holder) : before_(std::exchange(acting_for, holder)) {}
ActingFor::~ActingFor() { acting_for = before_; }

Session::Session(std::shared_ptr<const Model> model, std::uint64_t seed)
    : model_(std::move(model)), cache_(model_->kv_pool()), random_{seed, 0} {}

std::vector<std::int32_t> Session::tokens() {
    const SessionLock lock(*this);
    return tokens_;
}

bool Session::has_tokens(const std::vector<std::int32_t>& tokens) {
    const SessionLock lock(*this);
    return tokens == tokens_;
}

std::int32_t Session::n_tokens() {
    const SessionLock lock(*this);
    return static_cast<std::int32_t>(tokens_.size());
}

std::int32_t Session::n_unread() {
    const SessionLock lock(*this);
    return static_cast<std::int32_t>(unread());
}

std::vector<float> Session::logits() {
    const SessionLock lock(*this);
    read_all();
    return {logits_.values.begin(), logits_.values.begin() + model_->config().vocab_size};
}

std::int32_t Session::sample(const SamplingParams& params, const StreamDecoder* text,
                             const std::vector<std::int32_t>* allowed) {
    const SessionLock lock(*this);
    validate(params, model_->config().vocab_size);
    read_all();
    return draw(params, text, allowed);
}

std::int32_t Session::draw(const SamplingParams& params, const StreamDecoder* text,
                           const std::vector<std::int32_t>* allowed) {
    RandomState random = random_;
    const std::int32_t token =
        tinyllama::sample(model_->kernels(), logits_, tokens_, params, random, text, allowed);
    random_ = random;
    return token;
}

double Session::log_probability(std::int32_t token) { return log_probabilities({token})[0]; }

std::vector<double> Session::log_probabilities(const std::vector<std::int32_t>& tokens) {
    const SessionLock lock(*this);
    check_vocabulary(tokens.data(), tokens.size());
    read_all();
    return tinyllama::log_probabilities(model_->kernels(), logits_, tokens);
}

std::size_t Session::sample_one_of(const std::vector<double>& scores,
                                   const SamplingParams& params) {
    const SessionLock lock(*this);
    RandomState random = random_;
    const std::size_t drawn = tinyllama::sample_one_of(model_->kernels(), scores, params, random);
    random_ = random;
    return drawn;
}

std::vector<std::pair<std::int32_t, double>> Session::top_log_probabilities(std::int32_t n) {
    const SessionLock lock(*this);
    read_all();
    return tinyllama::top_log_probabilities(model_->kernels(), logits_, n);
}

void Session::check_vocabulary(const std::int32_t* tokens, std::size_t n) const {
    const std::int32_t vocab_size = model_->config().vocab_size;
    for (std::size_t i = 0; i < n; ++i) {
        if (tokens[i] >= 0 && tokens[i] < vocab_size) continue;
        throw Error(Status::invalid_argument, "token " + std::to_string(tokens[i]) +
                                                  " is outside the " + std::to_string(vocab_size) +
                                                  " tokens of " + model_->name());
    }
}

void Session::check(const std::int32_t* tokens, std::size_t n) const {
    check_vocabulary(tokens, n);
    const auto max_seq_len = static_cast<std::size_t>(model_->config().max_seq_len);
    if (n > max_seq_len - tokens_.size()) {
        throw Error(Status::context_full,
                    std::to_string(n) + " tokens do not fit: the context of " +
                        std::to_string(max_seq_len) + " tokens has room for " +
                        std::to_string(max_seq_len - tokens_.size()));
    }
}

// Whoever wants to use the cache or the logits of a session takes it out of a pass that is not
// over: what it read of that session is read again later.
void Session::leave_pass() {
    if (pass_ != nullptr) pass_->drop(cache_);
    pass_ = nullptr;
}

void Session::append(TokenSpan tokens) {
    const SessionLock lock(*this);
    check(tokens.data, tokens.size);
    tokens_.insert(tokens_.end(), tokens.begin(), tokens.end());
}

void Session::append(TokenSpan tokens, std::size_t n_first, std::size_t n_most) {
    const SessionLock lock(*this);
    check_vocabulary(tokens.data, tokens.size);
    const std::size_t n = tokens_.size() + tokens.size;
    tokens_.insert(tokens_.end(), tokens.begin(), tokens.end());
    if (n <= n_most) return;
    leave_pass();
    n_read_ = std::min(n_read_, n_first);
    const auto first = tokens_.begin() + static_cast<std::ptrdiff_t>(n_first);
    tokens_.erase(first, first + static_cast<std::ptrdiff_t>(n - n_most));
}

void Session::drop_cache() {
    const SessionLock lock(*this);
    leave_pass();
    n_read_ = 0;
    cache_ = KvCache(model_->kv_pool());
    logits_ = Logits();
}

void Session::add_rows(std::size_t n, std::vector<Row>* rows) {
    const std::size_t end = n_read_ + n;
    const bool all = end == tokens_.size();
    cache_.reserve(static_cast<std::int32_t>(n_read_), static_cast<std::int32_t>(end));
    if (all) logits_.resize(static_cast<std::size_t>(model_->config().vocab_size));
    for (std::size_t i = n_read_; i < end; ++i)
        rows->push_back({&cache_, static_cast<std::int32_t>(i), tokens_[i], nullptr});
    if (!all) return;
    rows->back().logits = logits_.values.data();
    rows->back().maxima = logits_.maxima.data();
}

// What is left had its logits, if at all, in the middle: its last token is read once more. The
// promise of invariance makes that the same bits.
void Session::keep(std::size_t n_tokens) {
    if (n_tokens == tokens_.size()) return;
    leave_pass();
    tokens_.resize(n_tokens);
    n_read_ = std::min(n_read_, std::max<std::size_t>(n_tokens, 1) - 1);
}

std::size_t Session::n_in_common_with(const Session& other) const {
    if (tokens_.empty()) return 0;
    const auto most = std::min(tokens_.size() - 1, other.tokens_.size());
    const auto end = tokens_.begin() + static_cast<std::ptrdiff_t>(most);
    return static_cast<std::size_t>(
        std::mismatch(tokens_.begin(), end, other.tokens_.begin()).first - tokens_.begin());
}

void Session::share_beginning(Session& other, std::size_t n) {
    leave_pass();
    cache_ = other.cache_.share(static_cast<std::int32_t>(n));
    n_read_ = n;
}

void Session::refuse_nonfinite_logits() {
    const auto pos = static_cast<std::int32_t>(tokens_.size()) - 1;
    try {
        refuse_nonfinite(*model_, {&cache_, pos, tokens_.back(), logits_.values.data()});
    } catch (...) {
        n_read_ -= 1;
        throw;
    }
}

void Session::read_all() {
    if (tokens_.empty()) {
        throw Error(Status::invalid_argument, "the session is empty: feed it a token first");
    }
    if (unread() == 0) return;
    leave_pass();
    std::vector<Row> rows;
    while (unread() > 0) {
        const std::size_t n = std::min(unread(), max_rows);
        rows.clear();
        add_rows(n, &rows);
        read_rows(*model_, rows);
        has_read(n);
    }
}

void Session::rewind(std::int32_t n_tokens) {
    const SessionLock lock(*this);
    if (n_tokens < 0 || static_cast<std::size_t>(n_tokens) > tokens_.size()) {
        throw Error(Status::invalid_argument, "cannot rewind to " + std::to_string(n_tokens) +
                                                  " tokens: the session has " +
                                                  std::to_string(tokens_.size()));
    }
    keep(static_cast<std::size_t>(n_tokens));
}

std::shared_ptr<Session> Session::fork(std::uint64_t seed) {
    const SessionLock lock(*this);
    auto copy = std::make_shared<Session>(model_, seed);
    copy->tokens_ = tokens_;
    copy->n_read_ = n_read_;
    copy->cache_ = cache_.share(static_cast<std::int32_t>(n_read_));
    if (unread() == 0) copy->logits_ = logits_;
    return copy;
}

std::shared_ptr<Session> Session::unread_copy() {
    const SessionLock lock(*this);
    auto copy = std::make_shared<Session>(model_, 0);
    copy->tokens_ = tokens_;
    return copy;
}

void feed(const std::vector<Feed>& feeds, const std::function<void()>& between_chunks,
          const Tap* tap) {
    if (feeds.empty()) return;
    FeedTransaction transaction(feeds);
    const Model& model = feeds.front().session->model();
    const auto vocab_size = static_cast<std::size_t>(model.config().vocab_size);
    std::vector<Row> rows;
    std::vector<std::pair<Session*, std::size_t>> reading;
    const auto flush = [&] {
        if (rows.empty()) return;
        read_rows(model, rows, tap);
        for (const auto& [session, n] : reading)
            session->has_read(n);
        rows.clear();
        reading.clear();
    };
    for (const Feed& feed : feeds) {
        Session& session = *feed.session;
        const std::size_t n_before = session.tokens_.size();
        session.tokens_.insert(session.tokens_.end(), feed.tokens.begin(), feed.tokens.end());
        for (std::size_t n_left = feed.tokens.size == 0 ? 0 : session.unread(); n_left > 0;) {
            const std::size_t n = std::min(n_left, max_rows - rows.size());
            session.add_rows(n, &rows);
            reading.emplace_back(&session, n);
            for (auto row = rows.end() - static_cast<std::ptrdiff_t>(n); row != rows.end(); ++row) {
                const auto pos = static_cast<std::size_t>(row->pos);
                if (pos < n_before) continue;
                if (feed.excerpts != nullptr) row->excerpt = feed.excerpts + (pos - n_before);
                if (feed.all_logits == nullptr) continue;
                row->logits = feed.all_logits + (pos - n_before) * vocab_size;
                row->maxima = nullptr;
            }
            n_left -= n;
            if (rows.size() < max_rows) continue;
            flush();
            between_chunks();
        }
    }
    flush();
    for (const Feed& feed : feeds) {
        if (feed.tokens.size == 0 || feed.all_logits == nullptr) continue;
        const float* last = feed.all_logits + (feed.tokens.size - 1) * vocab_size;
        std::copy(last, last + vocab_size, feed.session->logits_.values.begin());
        feed.session->logits_.find_maxima();
    }
    transaction.commit();
}

void draw_each(std::vector<Draw>& draws) {
    if (draws.empty()) return;
    const Model& model = draws.front().session->model();
    const auto n = static_cast<std::int64_t>(draws.size());
    for (Draw& draw : draws) {
        try {
            draw.lock.emplace(*draw.session);
            draw.session->read_all();
        } catch (...) {
            draw.error = std::current_exception();
        }
    }
    const bool little = n * model.config().vocab_size < (1 << 16);
    Threads& threads = model.threads();
    threads.parallel_for(little ? 1 : threads.size(), n, [&](std::int64_t begin, std::int64_t end) {
        for (auto i = static_cast<std::size_t>(begin); i < static_cast<std::size_t>(end); ++i) {
            Draw& draw = draws[i];
            try {
                if (draw.error == nullptr)
                    draw.token = draw.session->draw(*draw.params, draw.text, draw.allowed);
            } catch (...) {
                draw.error = std::current_exception();
            }
        }
    });
    for (Draw& draw : draws)
        draw.lock.reset();
}

}  // namespace tinyllama

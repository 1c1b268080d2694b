#include "request.h"

#include <algorithm>
#include <utility>

namespace tinyllama {
namespace {

// Length of the longest end of `text` that begins `stop` without completing it. Both are UTF-8, of
// which no character begins inside another, so that it is whole characters.
std::size_t overlap(std::string_view text, std::string_view stop) {
    for (std::size_t n = std::min(text.size(), stop.size() - 1); n > 0; --n) {
        if (text.substr(text.size() - n) == stop.substr(0, n)) return n;
    }
    return 0;
}

}  // namespace

Request::Request(std::shared_ptr<Session> session, const std::vector<std::int32_t>& prompt,
                 std::shared_ptr<StreamDecoder> decoder, const SamplingParams& params,
                 Limits limits, std::optional<std::int32_t> n_top, Urgency urgency, Form form,
                 std::unique_ptr<Constraint> constraint)
    : session_(std::move(session)),
      prompt_(prompt),
      decoder_(std::move(decoder)),
      first_decoder_(*decoder_),
      params_(params),
      limits_(std::move(limits)),
      n_top_(n_top),
      urgency_(urgency),
      form_(std::move(form)),
      constraint_(std::move(constraint)) {
    prepare();
}

void Request::begin() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (std::exchange(begun_, true)) return;
    try {
        // More than any step makes: those of an endless text take no memory (see forget()).
        tokens_.reserve(64);
        text_.reserve(512);
        append_prompt();
    } catch (...) {
        begun_ = false;
        throw;
    }
    prompt_ = {};
    params_.n_prompt_tokens = early_params_.n_prompt_tokens = session_->n_tokens();
    try {
        if (make_room() && limits_.max_new_tokens.value_or(1) <= 0) end(Ending::length);
        constrain();
    } catch (...) {
        error_ = std::current_exception();
        end(Ending::error);
    }
}

// Checks the options, and derives what follows from them.
void Request::prepare() {
    const Model& model = session_->model();
    if (form_.kind == "choices") {
        std::vector<std::string>& texts = form_.texts;
        std::sort(texts.begin(), texts.end());
        texts.erase(std::unique(texts.begin(), texts.end()), texts.end());
        if (texts.size() > 1 && texts.size() <= Election::most_texts && tokens_.empty())
            election_ =
                std::make_unique<Election>(model.token_trie(), texts, first_decoder_.at_start());
        constraint_ = std::make_unique<Choices>(model.tokenizer(), model.token_trie(), form_.texts,
                                                first_decoder_.at_start());
    } else if (form_.kind.empty() != (constraint_ == nullptr)) {
        throw Error(Status::invalid_argument,
                    "a text of the form '" + form_.kind + "' needs its constraint");
    }
    early_params_ = params_;
    early_params_.banned.insert(early_params_.banned.end(), limits_.end_tokens.begin(),
                                limits_.end_tokens.end());
    const Config& config = session_->model().config();
    validate(early_params_, config.vocab_size);
    const bool cuts =
        limits_.on_overflow == Overflow::shift || limits_.on_overflow == Overflow::truncate;
    if (cuts && (limits_.n_keep < 0 || limits_.n_keep > config.max_seq_len - 2))
        throw Error(Status::invalid_argument,
                    "n_keep is " + std::to_string(limits_.n_keep) + "; with a context of " +
                        std::to_string(config.max_seq_len) + " it must be in [0, " +
                        std::to_string(config.max_seq_len - 2) + "]");
}

RequestState Request::state() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    RequestState state;
    state.params = params_;
    state.limits = limits_;
    state.form = form_;
    state.priority = urgency_.priority;
    if (urgency_.deadline != Clock::time_point::max())
        state.time_left = urgency_.deadline - Clock::now();
    state.pending = first_decoder_.pending();
    state.at_start = first_decoder_.at_start();
    state.n_forgotten = n_forgotten_;
    state.tokens = tokens_;
    state.n_taken = n_taken_;
    state.ending = ending_;
    state.n_reported = n_reported_;
    state.wish = wish_.load();
    return state;
}

Request::Request(std::shared_ptr<Session> session, const RequestState& state,
                 std::unique_ptr<Constraint> constraint)
    : session_(std::move(session)),
      begun_(true),
      decoder_(std::make_shared<StreamDecoder>(session_->model().tokenizer(), state.at_start,
                                               state.pending)),
      first_decoder_(*decoder_),
      params_(state.params),
      limits_(state.limits),
      form_(state.form),
      constraint_(std::move(constraint)),
      n_forgotten_(state.n_forgotten),
      tokens_(state.tokens),
      wish_(state.wish),
      n_reported_(state.n_reported) {
    try {
        prepare();
        for (const std::int32_t token : tokens_) {
            if (ending_ != Ending::none) break;
            if (constraint_ != nullptr) constraint_->accept(token);
            append(decoder_->push(token));
        }
        if (ending_ == Ending::none && state.ending == Ending::stop) finish_text();
        if (ending_ == Ending::none && state.ending != Ending::none) end(state.ending);
        constrain();
    } catch (const Error& error) {
        throw Error(Status::format_error,
                    std::string("the saved request cannot go on: ") + error.what());
    }
    if (ending_ != state.ending || state.n_taken > n_certain_ || n_reported_ > tokens_.size() ||
        n_forgotten_ < 0)
        throw Error(Status::format_error, "the saved request contradicts itself");
    n_taken_ = state.n_taken;
    urgency_.priority = state.priority;
    if (state.time_left)
        urgency_.deadline =
            Clock::now() + std::chrono::duration_cast<Clock::duration>(*state.time_left);
}

void Request::append_prompt() {
    if (prompt_.empty() && session_->n_tokens() == 0)
        throw Error(Status::invalid_argument, "there is nothing to continue: the session is empty");
    const Overflow policy = limits_.on_overflow;
    if (policy == Overflow::stop || policy == Overflow::error) {
        session_->append(prompt_);
        return;
    }
    const std::int64_t context = session_->model().config().max_seq_len;
    const std::int64_t n_keep = limits_.n_keep;
    const std::int64_t half = n_keep + (context - n_keep) / 2;
    std::int64_t n_most = half;
    if (policy == Overflow::truncate && limits_.max_new_tokens)
        n_most = std::max(context - *limits_.max_new_tokens, n_keep + 1);
    const std::int64_t n = session_->n_tokens() + static_cast<std::int64_t>(prompt_.size());
    const bool cut = n >= context || (policy == Overflow::truncate && limits_.max_new_tokens);
    session_->append(prompt_, static_cast<std::size_t>(n_keep),
                     static_cast<std::size_t>(cut ? n_most : context));
}

// Whether the context has room for a token, which is made where that was asked for, and then for as
// many as wanted if it can be. If not, the text ends.
bool Request::make_room(std::int32_t n_wanted) {
    const std::int32_t context = session_->model().config().max_seq_len;
    const std::int32_t n = session_->n_tokens();
    const std::int32_t n_keep = limits_.n_keep, half = n_keep + (context - n_keep) / 2;
    const bool shifts = limits_.on_overflow == Overflow::shift && n > half;
    if (n < context && !(shifts && n + n_wanted > context)) return true;
    if (limits_.on_overflow == Overflow::error)
        throw Error(Status::context_full, "the context of " + std::to_string(context) +
                                              " tokens is full, and the text has not ended");
    if (limits_.on_overflow != Overflow::shift) {
        end(Ending::length);
        return false;
    }
    session_->append(TokenSpan(nullptr, 0), static_cast<std::size_t>(n_keep),
                     static_cast<std::size_t>(half));
    const std::int32_t n_dropped = n - half;
    for (SamplingParams* params : {&params_, &early_params_})
        params->n_prompt_tokens -= std::clamp(params->n_prompt_tokens - n_keep, 0, n_dropped);
    return true;
}

void Request::pause() {
    Wish run = Wish::run;
    wish_.compare_exchange_strong(run, Wish::pause);
}

void Request::resume() {
    Wish pause = Wish::pause;
    wish_.compare_exchange_strong(pause, Wish::run);
}

std::vector<std::int32_t> Request::tokens() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return tokens_;
}

std::vector<TokenLogprob> Request::logprobs() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return logprobs_;
}

Ending Request::ending() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return ending_;
}

void Request::rethrow() const {
    std::unique_lock<std::mutex> lock(mutex_);
    const std::exception_ptr error = error_;
    lock.unlock();
    if (error != nullptr) std::rethrow_exception(error);
}

std::string Request::text() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return text_.substr(0, n_certain_);
}

void Request::take_text(std::string* text) {
    const std::lock_guard<std::mutex> lock(mutex_);
    text->append(text_, n_taken_, n_certain_ - n_taken_);
    n_taken_ = n_certain_;
}

void Request::forget() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (constraint_ != nullptr || n_taken_ < text_.size() || n_reported_ < tokens_.size()) return;
    n_forgotten_ = n_drawn();
    first_decoder_ = *decoder_;
    tokens_.clear();
    text_.clear();
    n_reported_ = n_certain_ = n_taken_ = 0;
}

void Request::conclude(Ending ending, std::exception_ptr error) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (ending_ != Ending::none) return;
    error_ = std::move(error);
    source_ = nullptr;
    election_ = nullptr;
    end(ending);
}

Draw Request::next_draw() const {
    const bool early = n_drawn() < limits_.min_new_tokens;
    return {session_.get(), early ? &early_params_ : &params_, decoder_.get(),
            constraint_ == nullptr ? nullptr : &allowed_.tokens};
}

void Request::accept(std::int32_t token) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const std::vector<std::int32_t>& ends = limits_.end_tokens;
    if (std::find(ends.begin(), ends.end(), token) != ends.end()) {
        finish_text();
        return;
    }
    if (!make_room()) return;  // somebody else has filled it
    if (n_top_) {
        logprobs_.push_back(
            {token, session_->log_probability(token), session_->top_log_probabilities(*n_top_)});
    }
    add(token);
    constrain();
}

void Request::add(std::int32_t token) {
    tokens_.push_back(token);
    session_->append(TokenSpan(&token, 1));
    if (constraint_ != nullptr) constraint_->accept(token);
    append(decoder_->push(token));
    if (ending_ != Ending::none) return;
    // A character that the limit cuts in two is left out: half of it means nothing.
    if (limits_.max_new_tokens && n_drawn() >= *limits_.max_new_tokens) {
        end(Ending::length);
    } else if (constraint_ == nullptr) {  // by a constraint it may be complete
        make_room();
    }
}

// Adds what has to follow, and finds what may be drawn then. Where log-probabilities are asked for,
// what has to follow is drawn, token by token: from one alone.
void Request::constrain() {
    if (constraint_ == nullptr || election_ != nullptr || ending_ != Ending::none) return;
    const auto& ends = limits_.end_tokens;
    const auto is_wrong = [&](std::int32_t token) {
        return token >= session_->model().config().vocab_size ||
               std::find(ends.begin(), ends.end(), token) != ends.end();
    };
    if (n_top_ && !forced_.empty()) forced_.erase(forced_.begin());  // it was drawn
    while (forced_.empty()) {
        forced_ = constraint_->find_forced();
        forced_.erase(std::find_if(forced_.begin(), forced_.end(), is_wrong), forced_.end());
        if (forced_.empty() || n_top_) break;
        for (const std::int32_t token : std::exchange(forced_, {})) {
            if (!make_room()) return;
            add(token);
            if (ending_ != Ending::none) return;
        }
    }
    if (!forced_.empty()) {
        allowed_ = {{forced_.front()}, false};
        make_room();
        return;
    }
    constraint_->find_allowed(&allowed_);
    std::vector<std::int32_t>& tokens = allowed_.tokens;
    tokens.erase(std::remove_if(tokens.begin(), tokens.end(), is_wrong), tokens.end());
    if (tokens.empty() && allowed_.end) {
        finish_text();
        return;
    }
    if (tokens.empty())
        throw Error(Status::invalid_argument, "no token can follow: the text cannot be completed");
    if (!make_room() || !allowed_.end) return;
    tokens.insert(tokens.end(), ends.begin(), ends.end());
    std::sort(tokens.begin(), tokens.end());
}

std::shared_ptr<Request> Request::scout(std::int32_t first,
                                        std::unique_ptr<Constraint> rest) const {
    const Limits limits;  // of what does not fit, as much is scored as does
    auto request =
        std::make_shared<Request>(session_->unread_copy(), std::vector<std::int32_t>{first},
                                  std::make_shared<StreamDecoder>(*decoder_), SamplingParams{},
                                  limits, 0, urgency_, Form{"scout", {}}, std::move(rest));
    request->is_scout_ = true;
    request->begin();
    return request;
}

bool Request::make_room_for_election() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return make_room(election_->n_longest());
}

// Draws one of the choices, and goes on with that. A save holds no more than what was drawn.
void Request::elect() {
    const std::lock_guard<std::mutex> lock(mutex_);
    form_.texts = {election_->draw(*session_, params_)};
    constraint_ =
        std::make_unique<Choices>(session_->model().tokenizer(), session_->model().token_trie(),
                                  form_.texts, first_decoder_.at_start());
    election_ = nullptr;
    constrain();
}

void Request::finish_text() {
    append(decoder_->finish());
    end(Ending::stop);
}

// Ends the text before a stop string, or holds back what may become one.
void Request::append(std::string_view piece) {
    text_ += piece;
    std::size_t found = std::string::npos, n_held = 0;
    for (const std::string& stop : limits_.stops) {
        found = std::min(found, text_.find(stop, n_certain_));
        n_held = std::max(n_held, overlap(std::string_view(text_).substr(n_certain_), stop));
    }
    if (found != std::string::npos) {
        text_.resize(found);
        end(Ending::stop);
    } else {
        n_certain_ = text_.size() - n_held;
    }
}

void Request::end(Ending ending) {
    ending_ = ending;
    n_certain_ = text_.size();
}

}  // namespace tinyllama

#include "request.h"

#include <algorithm>

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
                 Limits limits, std::optional<std::int32_t> n_top, Urgency urgency)
    : session_(std::move(session)),
      decoder_(std::move(decoder)),
      params_(params),
      limits_(std::move(limits)),
      n_top_(n_top),
      urgency_(urgency) {
    validate(params_, session_->model().config().vocab_size);
    session_->append(prompt);
    const std::int32_t n_prompt = session_->n_tokens();
    if (n_prompt == 0)
        throw Error(Status::invalid_argument, "there is nothing to continue: the session is empty");
    params_.n_prompt_tokens = n_prompt;
    early_params_ = params_;
    early_params_.banned.insert(early_params_.banned.end(), limits_.end_tokens.begin(),
                                limits_.end_tokens.end());
    room_ = session_->model().config().max_seq_len - n_prompt;
    room_ = std::min<std::int64_t>(room_, limits_.max_new_tokens.value_or(room_));
    if (room_ <= 0) end(Ending::length);
}

void Request::pause() {
    Wish run = Wish::run;
    wish_.compare_exchange_strong(run, Wish::pause);
}

void Request::resume() {
    Wish pause = Wish::pause;
    wish_.compare_exchange_strong(pause, Wish::run);
}

std::string_view Request::take_text() {
    const std::string_view piece = text().substr(n_taken_);
    n_taken_ = n_certain_;
    return piece;
}

Draw Request::next_draw() const {
    const bool early = tokens_.size() < static_cast<std::size_t>(limits_.min_new_tokens);
    return {session_.get(), early ? &early_params_ : &params_, decoder_.get()};
}

void Request::accept(std::int32_t token) {
    const std::vector<std::int32_t>& ends = limits_.end_tokens;
    if (std::find(ends.begin(), ends.end(), token) != ends.end()) {
        append(decoder_->finish());
        end(Ending::stop);
        return;
    }
    if (n_top_) {
        logprobs_.push_back(
            {token, session_->log_probability(token), session_->top_log_probabilities(*n_top_)});
    }
    tokens_.push_back(token);
    session_->append({token});
    append(decoder_->push(token));
    // A character that the limit cuts in two is left out: half of it means nothing.
    if (ending_ == Ending::none && static_cast<std::int64_t>(tokens_.size()) == room_)
        end(Ending::length);
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

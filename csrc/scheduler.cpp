#include "scheduler.h"

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

Request::Request(std::shared_ptr<Session> session, std::vector<std::int32_t> prompt,
                 std::shared_ptr<StreamDecoder> decoder, const SamplingParams& params,
                 Limits limits, std::optional<std::int32_t> n_top)
    : session_(std::move(session)),
      unread_(std::move(prompt)),
      decoder_(std::move(decoder)),
      params_(params),
      limits_(std::move(limits)),
      n_top_(n_top) {
    const auto n_prompt = session_->n_tokens() + static_cast<std::int32_t>(unread_.size());
    params_.n_prompt_tokens = n_prompt;
    early_params_ = params_;
    early_params_.banned.insert(early_params_.banned.end(), limits_.end_tokens.begin(),
                                limits_.end_tokens.end());
    room_ = session_->model().config().max_seq_len - n_prompt;
    room_ = std::min<std::int64_t>(room_, limits_.max_new_tokens.value_or(room_));
    if (room_ <= 0) end(Ending::length);
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
    unread_.assign(1, token);
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

void Scheduler::step(const Check& check) {
    read(check);
    draw();
    read(check);
    remove_ended();
}

std::vector<std::shared_ptr<Request>> Scheduler::run(const Check& check) {
    while (!live_.empty()) {
        read(check);
        draw();
        std::vector<std::shared_ptr<Request>> ended = remove_ended();
        if (!ended.empty()) return ended;
        check();
    }
    return {};
}

// One forward pass over all that is unread.
void Scheduler::read(const Check& check) {
    feeds_.clear();
    for (const auto& request : live_) {
        if (!request->unread_.empty())
            feeds_.push_back({request->session_.get(), request->unread_, nullptr});
    }
    feed(feeds_, check);
    for (const auto& request : live_)
        request->unread_.clear();
}

void Scheduler::draw() {
    draws_.clear();
    drawing_.clear();
    for (const auto& request : live_) {
        if (request->ending_ != Ending::none) continue;
        draws_.push_back(request->next_draw());
        drawing_.push_back(request.get());
    }
    sample_each(draws_);
    for (std::size_t i = 0; i < draws_.size(); ++i)
        drawing_[i]->accept(draws_[i].token);
}

std::vector<std::shared_ptr<Request>> Scheduler::remove_ended() {
    std::vector<std::shared_ptr<Request>> ended;
    std::size_t n_left = 0;
    for (auto& request : live_) {
        if (request->ending_ == Ending::none) {
            live_[n_left++].swap(request);
        } else {
            ended.push_back(std::move(request));
        }
    }
    live_.resize(n_left);
    return ended;
}

}  // namespace tinyllama

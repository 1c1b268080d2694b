#include "election.h"

#include <algorithm>
#include <limits>

#include "request.h"
#include "session.h"
#include "status.h"

namespace tinyllama {
namespace {

// Of one session at a time: each takes memory for keys, values and logits.
constexpr std::size_t most_scouts = 4;

// The text is certain, token by token.
class Exactly : public Constraint {
public:
    explicit Exactly(std::vector<std::int32_t> tokens) : tokens_(std::move(tokens)) {}
    void find_allowed(Allowed* allowed) override { *allowed = {{}, n_written_ == tokens_.size()}; }
    std::vector<std::int32_t> find_forced() override {
        return {tokens_.begin() + static_cast<std::ptrdiff_t>(n_written_), tokens_.end()};
    }
    void accept(std::int32_t /*token*/) override { ++n_written_; }

private:
    std::vector<std::int32_t> tokens_;
    std::size_t n_written_ = 0;
};

}  // namespace

Election::Election(const TokenTrie& trie, const std::vector<std::string>& texts, bool at_start) {
    for (const std::string& text : texts) {
        std::vector<std::int32_t> tokens = trie.spell(text, at_start);
        if (tokens.empty())
            throw Error(Status::invalid_argument,
                        "the vocabulary has no tokens for the choice '" + text + "'");
        ways_.push_back({text, std::move(tokens)});
    }
}

Election::~Election() = default;

bool Election::can_go_on(Session& session) const {
    if (session.n_unread() > 0) return false;
    if (is_over() || !has_begun(session)) return true;
    if (next_ < ways_.size() && scouts_.size() < most_scouts) return true;
    return std::any_of(scouts_.begin(), scouts_.end(),
                       [](const auto& scout) { return scout.second->ending() != Ending::none; });
}

void Election::go_on(const Request& elector, std::vector<std::shared_ptr<Request>>* sent) {
    Session& session = elector.session();
    if (!has_begun(session)) begin(session);
    const auto is_heard = [&](const auto& scout) {
        const auto& [i, request] = scout;
        if (request->ending() == Ending::none) return false;
        request->rethrow();
        for (const TokenLogprob& token : request->logprobs())
            ways_[i].score += token.logprob;
        ++n_scored_;
        return true;
    };
    scouts_.erase(std::remove_if(scouts_.begin(), scouts_.end(), is_heard), scouts_.end());
    for (; next_ < ways_.size() && scouts_.size() < most_scouts; ++next_) {
        const std::vector<std::int32_t>& tokens = ways_[next_].tokens;
        if (tokens.size() == 1) {
            ++n_scored_;
            continue;
        }
        scouts_.emplace_back(
            next_,
            elector.scout(tokens.front(), std::make_unique<Exactly>(std::vector<std::int32_t>(
                                              tokens.begin() + 1, tokens.end()))));
        sent->push_back(scouts_.back().second);
    }
}

std::int32_t Election::n_longest() const {
    std::size_t n = 0;
    for (const Way& way : ways_)
        n = std::max(n, way.tokens.size());
    return static_cast<std::int32_t>(n);
}

// And its tokens are what they were then.
bool Election::has_begun(Session& session) const { return begun_ && session.has_tokens(before_); }

void Election::begin(Session& session) {
    std::vector<std::int32_t> first;
    for (const Way& way : ways_)
        first.push_back(way.tokens.front());
    const std::vector<double> scores = session.log_probabilities(first);
    for (std::size_t i = 0; i < ways_.size(); ++i)
        ways_[i].score = scores[i];
    before_ = session.tokens();
    next_ = n_scored_ = 0;
    for (const auto& [way, scout] : scouts_)
        scout->cancel();
    scouts_.clear();
    begun_ = true;
}

const std::string& Election::draw(Session& session, const SamplingParams& params) const {
    std::vector<double> scores;
    for (const Way& way : ways_) {
        scores.push_back(way.score);
        for (const std::int32_t token : way.tokens) {
            for (const auto& [other, bias] : params.logit_bias)
                scores.back() += other == token ? static_cast<double>(bias) : 0.0;
            if (std::find(params.banned.begin(), params.banned.end(), token) != params.banned.end())
                scores.back() = -std::numeric_limits<double>::infinity();
        }
    }
    return ways_[session.sample_one_of(scores, params)].text;
}

}  // namespace tinyllama

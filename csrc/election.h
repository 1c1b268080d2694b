// Which of several texts comes next, drawn by the probabilities that the model gives to whole
// texts.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "constraint.h"
#include "sampler.h"

namespace tinyllama {

class Request;
class Session;

// Texts are scored by scouts: requests of their own that begin as the session does, have to write
// one of them each, and keep the log-probabilities of its tokens. So they are read in the batches,
// and under the budgets, of all that a scheduler does.
class Election {
public:
    // More texts than this are not scored, but drawn token by token among those that still fit.
    static constexpr std::size_t most_texts = 64;

    // No text twice. `at_start`: see Tokenizer::encode. Throws Error(invalid_argument) for a text
    // that the vocabulary has no tokens for.
    Election(const TokenTrie& trie, const std::vector<std::string>& texts, bool at_start);
    ~Election();
    Election(const Election&) = delete;
    Election& operator=(const Election&) = delete;

    // Whether something can be done now, the session being the elector's: to send a scout, to hear
    // of one, or to draw.
    bool can_go_on(Session& session) const;
    // Goes on as far as that is possible; the scouts that it sends are appended to `sent`. Throws
    // what went wrong with one.
    void go_on(const Request& elector, std::vector<std::shared_ptr<Request>>* sent);
    bool is_over() const { return n_scored_ == ways_.size(); }
    // Tokens of the longest text.
    std::int32_t n_longest() const;
    // Once it is over: draws by temperature, top_k, top_p and min_p. A text has the bias of all its
    // tokens, and is banned with one of them. Throws Error(invalid_argument) when none is left.
    const std::string& draw(Session& session, const SamplingParams& params) const;

private:
    struct Way {
        std::string text;
        std::vector<std::int32_t> tokens;
        double score = 0;  // natural logarithm of the probability, as far as it is known
    };
    bool has_begun(Session& session) const;
    void begin(Session& session);

    std::vector<Way> ways_;
    bool begun_ = false;
    std::vector<std::int32_t> before_;  // tokens of the session when it began
    std::size_t next_ = 0;              // of ways_, for which no scout was sent
    std::size_t n_scored_ = 0;
    std::vector<std::pair<std::size_t, std::shared_ptr<Request>>> scouts_;  // and their ways
};

}  // namespace tinyllama

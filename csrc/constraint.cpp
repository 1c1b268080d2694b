#include "constraint.h"

#include <algorithm>

#include "status.h"

namespace tinyllama {

// --- the vocabulary ------------------------------------------------------------------------------

TokenTrie::TokenTrie(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {
    for (std::int32_t token = 0; token < tokenizer.vocab_size(); ++token) {
        if (token != tokenizer.unk_id() && !tokenizer.token_bytes(token).empty())
            by_bytes_.push_back(token);
    }
    std::sort(by_bytes_.begin(), by_bytes_.end(), [&](std::int32_t a, std::int32_t b) {
        const int order = tokenizer.token_bytes(a).compare(tokenizer.token_bytes(b));
        return order != 0 ? order < 0 : a < b;
    });
}

void TokenTrie::find_beginnings(std::string_view text, std::vector<std::int32_t>* tokens) const {
    auto begin = by_bytes_.begin(), end = by_bytes_.end();
    for (std::size_t depth = 0; depth < text.size() && begin != end; ++depth) {
        // All of them have the same `depth` first bytes, and one more at least.
        const auto byte = [&](std::int32_t token) {
            return static_cast<unsigned char>(tokenizer_.token_bytes(token)[depth]);
        };
        const auto wanted = static_cast<unsigned char>(text[depth]);
        begin = std::partition_point(begin, end, [&](auto token) { return byte(token) < wanted; });
        end = std::partition_point(begin, end, [&](auto token) { return byte(token) == wanted; });
        // The shortest come first.
        for (; begin != end && tokenizer_.token_bytes(*begin).size() == depth + 1; ++begin)
            tokens->push_back(*begin);
    }
}

// --- one of several ------------------------------------------------------------------------------

Choices::Choices(const Tokenizer& tokenizer, const TokenTrie& trie,
                 const std::vector<std::string>& choices, bool at_start)
    : tokenizer_(tokenizer), trie_(trie) {
    if (choices.empty()) throw Error(Status::invalid_argument, "choices is empty");
    for (const std::string& choice : choices) {
        if (choice.empty()) throw Error(Status::invalid_argument, "choices holds an empty string");
        // With the space that stands before a text's first word, and is not shown.
        left_.push_back(at_start ? tokenizer.decode(tokenizer.encode(choice, false, false), false)
                                 : choice);
    }
}

void Choices::find_allowed(Allowed* allowed) {
    allowed->tokens.clear();
    allowed->end = false;
    for (const std::string& choice : left_) {
        allowed->end = allowed->end || choice.size() == n_written_;
        trie_.find_beginnings(std::string_view(choice).substr(n_written_), &allowed->tokens);
    }
    std::vector<std::int32_t>& tokens = allowed->tokens;
    std::sort(tokens.begin(), tokens.end());
    tokens.erase(std::unique(tokens.begin(), tokens.end()), tokens.end());
}

std::vector<std::int32_t> Choices::find_forced() {
    if (left_.size() > 1) return {};
    const std::string rest = left_[0].substr(n_written_);
    std::vector<std::int32_t> tokens = tokenizer_.encode(rest, false, false, false);
    if (tokenizer_.decode(tokens, false) != rest) return {};  // the vocabulary cannot spell it so
    return tokens;
}

void Choices::accept(std::int32_t token) {
    const std::string& bytes = tokenizer_.token_bytes(token);
    left_.erase(std::remove_if(left_.begin(), left_.end(),
                               [&](const std::string& choice) {
                                   return choice.compare(n_written_, bytes.size(), bytes) != 0;
                               }),
                left_.end());
    n_written_ += bytes.size();
    if (left_.empty())
        throw Error(Status::invalid_argument,
                    "token " + std::to_string(token) + " begins none of the choices");
}

}  // namespace tinyllama

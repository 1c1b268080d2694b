#include "constraint.h"

#include <algorithm>
#include <utility>

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

std::vector<std::int32_t> TokenTrie::spell(std::string_view text, bool at_start) const {
    std::vector<std::int32_t> tokens = tokenizer_.encode(text, false, false, at_start);
    if (tokenizer_.decode(tokens, at_start) == text) return tokens;
    tokens.clear();
    std::vector<std::int32_t> fitting;
    for (std::string_view rest = text; !rest.empty();) {
        fitting.clear();
        find_beginnings(rest, &fitting);
        // Where a text begins, a token may not show all of its bytes.
        const auto shows_all = [&](std::int32_t token) {
            return tokenizer_.decode({token}, at_start) == tokenizer_.token_bytes(token);
        };
        const auto longest = std::find_if(fitting.rbegin(), fitting.rend(), shows_all);
        if (longest == fitting.rend()) return {};
        tokens.push_back(*longest);
        rest.remove_prefix(tokenizer_.token_bytes(*longest).size());
        at_start = false;
    }
    return tokens;
}

// --- one of several ------------------------------------------------------------------------------

Choices::Choices(const Tokenizer& tokenizer, const TokenTrie& trie,
                 std::vector<std::string> choices, bool at_start)
    : tokenizer_(tokenizer), trie_(trie), left_(std::move(choices)), at_start_(at_start) {
    if (left_.empty()) throw Error(Status::invalid_argument, "choices is empty");
    std::sort(left_.begin(), left_.end());
    left_.erase(std::unique(left_.begin(), left_.end()), left_.end());
    if (left_[0].empty()) throw Error(Status::invalid_argument, "choices holds an empty string");
}

std::string Choices::shown(std::int32_t token) const {
    return tokenizer_.decode({token}, at_start_);
}

void Choices::find_allowed(Allowed* allowed) {
    std::vector<std::int32_t>& tokens = allowed->tokens;
    tokens.clear();
    allowed->end = false;
    for (const std::string& choice : left_) {
        const std::string rest = choice.substr(n_written_);
        allowed->end = allowed->end || rest.empty();
        const std::size_t n_before = tokens.size();
        trie_.find_beginnings(rest, &tokens);
        if (!at_start_) continue;
        // Where a text begins, the first space of a token may not be shown.
        trie_.find_beginnings(" " + rest, &tokens);
        const auto does_not_fit = [&](std::int32_t token) {
            const std::string text = shown(token);
            return text.empty() || rest.compare(0, text.size(), text) != 0;
        };
        const auto first = tokens.begin() + static_cast<std::ptrdiff_t>(n_before);
        tokens.erase(std::remove_if(first, tokens.end(), does_not_fit), tokens.end());
    }
    std::sort(tokens.begin(), tokens.end());
    tokens.erase(std::unique(tokens.begin(), tokens.end()), tokens.end());
}

std::vector<std::int32_t> Choices::find_forced() {
    if (left_.size() > 1) return {};
    return trie_.spell(std::string_view(left_[0]).substr(n_written_), at_start_);
}

void Choices::accept(std::int32_t token) {
    std::string text;
    tokenizer_.append(token, &at_start_, &text);
    const auto differs = [&](const std::string& choice) {
        return choice.compare(n_written_, text.size(), text) != 0;
    };
    left_.erase(std::remove_if(left_.begin(), left_.end(), differs), left_.end());
    n_written_ += text.size();
    if (left_.empty())
        throw Error(Status::invalid_argument,
                    "token " + std::to_string(token) + " begins none of the choices");
}

}  // namespace tinyllama

// Texts of a certain form: which tokens may come next.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "tokenizer.h"

namespace tinyllama {

// What may follow.
struct Allowed {
    std::vector<std::int32_t> tokens;  // ascending, no end tokens among them
    bool end = false;                  // the text may end here
};

// Used by one thread at a time. What it throws ends the text with that error.
class Constraint {
public:
    virtual ~Constraint() = default;
    virtual void find_allowed(Allowed* allowed) = 0;
    // Tokens that have to follow, whatever the model would say: the best way to write what is
    // certain of the text. Empty where nothing is.
    virtual std::vector<std::int32_t> find_forced() = 0;
    // One of the allowed tokens was drawn, or one of the forced followed.
    virtual void accept(std::int32_t token) = 0;
};

// The tokens of a vocabulary in the order of their bytes, which is a trie of them: those that
// begin with the same bytes lie together.
class TokenTrie {
public:
    explicit TokenTrie(const Tokenizer& tokenizer);
    // Appends all tokens that `text` begins with, the longest last.
    void find_beginnings(std::string_view text, std::vector<std::int32_t>* tokens) const;
    // Tokens that show as exactly this text: as the tokenizer encodes it, where that keeps every
    // byte; else the longest that fit, one after the other. Empty where the vocabulary has none.
    std::vector<std::int32_t> spell(std::string_view text, bool at_start) const;

private:
    const Tokenizer& tokenizer_;
    std::vector<std::int32_t> by_bytes_;
};

// The text is one of several.
class Choices : public Constraint {
public:
    // `at_start`: see Tokenizer::encode. Throws Error(invalid_argument) when there is none, or one
    // is empty.
    Choices(const Tokenizer& tokenizer, const TokenTrie& trie, std::vector<std::string> choices,
            bool at_start);
    void find_allowed(Allowed* allowed) override;
    std::vector<std::int32_t> find_forced() override;
    void accept(std::int32_t token) override;

private:
    // What a token shows as here.
    std::string shown(std::int32_t token) const;

    const Tokenizer& tokenizer_;
    const TokenTrie& trie_;
    std::vector<std::string> left_;  // of the choices, those that are still possible
    std::size_t n_written_ = 0;      // bytes of them
    bool at_start_;
};

}  // namespace tinyllama

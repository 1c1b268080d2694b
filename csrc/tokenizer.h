// SentencePiece-BPE: text to tokens and back, from the vocabulary a GGUF file carries.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace tinyllama {

class GgufFile;

class Tokenizer {
public:
    // Reads tokenizer.ggml.*; throws Error(format_error) naming the key. Keys beyond the standard:
    // tokenizer.ggml.add_space_prefix (default true), tokenizer.ggml.remove_extra_whitespaces
    // (default false).
    explicit Tokenizer(const GgufFile& file);
    ~Tokenizer();
    Tokenizer(Tokenizer&&) noexcept;
    Tokenizer& operator=(Tokenizer&&) noexcept;

    std::int32_t vocab_size() const;
    std::int32_t bos_id() const;  // -1 where the vocabulary has none; likewise below
    std::int32_t eos_id() const;
    std::int32_t unk_id() const;
    bool add_bos() const;

    // UTF-8 text to tokens, as sentencepiece's BPE does it: O(n log n). Malformed bytes become
    // U+FFFD. Control tokens (<s>, </s>) are never produced from text.
    std::vector<std::int32_t> encode(std::string_view text, bool bos, bool eos) const;

    // Tokens to bytes: control tokens vanish, byte tokens become their byte, U+2581 a space, the
    // space that encode() put before the text is dropped when `at_start`. Bytes of a character
    // cut in two stay as they are. Throws Error(invalid_argument) for an id outside the vocabulary.
    std::string decode(const std::vector<std::int32_t>& tokens, bool at_start = true) const;

    // The bytes one token stands for, in the middle of a text.
    const std::string& token_bytes(std::int32_t token) const;

private:
    struct Impl;
    Impl* impl_;
};

// Joins tokens into text piece by piece, holding back bytes until they make a whole character.
class StreamDecoder {
public:
    StreamDecoder(const Tokenizer& tokenizer, bool at_start);
    // What became certain with this token: whole UTF-8 characters, possibly none. Malformed bytes
    // come out as U+FFFD, exactly as decoding the whole text with replacement would give.
    std::string push(std::int32_t token);
    // What is left: an unfinished character becomes U+FFFD.
    std::string finish();

private:
    const Tokenizer* tokenizer_;
    bool at_start_;
    std::string pending_;
};

}  // namespace tinyllama

// SentencePiece-BPE: text to tokens and back, from the vocabulary a GGUF file carries.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace tinyllama {

class GgufFile;

class Tokenizer {
public:
    // Reads tokenizer.ggml.*; throws Error(format_error) naming the key. Keys beyond the standard:
    // tokenizer.ggml.add_space_prefix (default true), tokenizer.ggml.remove_extra_whitespaces
    // (default false). Of two tokens with the same text, encode() produces the first.
    explicit Tokenizer(const GgufFile& file);
    Tokenizer(Tokenizer&&) = default;
    Tokenizer& operator=(Tokenizer&&) = default;
    Tokenizer(const Tokenizer&) = delete;  // ids_ looks into pieces_
    Tokenizer& operator=(const Tokenizer&) = delete;

    std::int32_t vocab_size() const { return static_cast<std::int32_t>(pieces_.size()); }
    std::int32_t bos_id() const { return bos_id_; }  // -1 where there is none; likewise below
    std::int32_t eos_id() const { return eos_id_; }
    std::int32_t unk_id() const { return unk_id_; }
    bool add_bos() const { return add_bos_; }
    // The same for the same vocabulary and rules, wherever they were read from.
    std::uint64_t hash() const;

    // UTF-8 text to tokens, as sentencepiece's BPE does it: O(n log n). Malformed bytes become
    // U+FFFD. Control tokens (<s>, </s>) are never produced from text; bos and eos ask for them
    // around it, and do nothing where the vocabulary has none. Unless at_start, the text continues
    // another: no space is put before it, and none removed there.
    std::vector<std::int32_t> encode(std::string_view text, bool bos, bool eos,
                                     bool at_start = true) const;

    // Tokens to bytes: control tokens vanish, byte tokens become their byte, U+2581 a space, the
    // unknown token " ⁇ "; the space that encode() put before the text is dropped when `at_start`.
    // Bytes of a character cut in two stay as they are. Throws Error(invalid_argument) for an id
    // outside the vocabulary.
    std::string decode(const std::vector<std::int32_t>& tokens, bool at_start = true) const;

    // One step of decode(): appends what `token` stands for. `at_start` says whether the space
    // before the text is still to be dropped, and is updated.
    void append(std::int32_t token, bool* at_start, std::string* text) const;

    // The bytes one token stands for, in the middle of a text.
    const std::string& token_bytes(std::int32_t token) const;

    // Tokens that break a text of whole characters (bytes from the middle of one), and tokens that
    // can follow a character cut in two.
    const std::vector<std::int32_t>& breaking() const { return breaking_; }
    const std::vector<std::int32_t>& continuing() const { return continuing_; }

private:
    // The numbers are those of the file format.
    enum class TokenType : std::uint8_t {
        normal = 1,
        unknown = 2,
        control = 3,
        user_defined = 4,
        unused = 5,
        byte = 6,
    };
    struct Unit;   // the next character or user-defined token of a text
    struct Merge;  // byte-pair encoding of one text in progress

    void read_pieces(const GgufFile& file);
    void read_special(const GgufFile& file);
    void index_pieces(const GgufFile& file);
    void index_characters();
    void check_token(std::int32_t token) const;
    std::size_t user_defined_length(std::string_view text) const;
    Unit next_unit(std::string_view text) const;
    std::string normalize(std::string_view text, bool at_start) const;
    std::int32_t find(std::string_view piece) const;

    std::vector<std::string> pieces_;  // as in the file
    std::vector<std::string> bytes_;   // what each decodes to
    std::vector<std::int32_t> breaking_;
    std::vector<std::int32_t> continuing_;
    std::vector<float> scores_;
    std::vector<TokenType> types_;
    std::unordered_map<std::string_view, std::int32_t> ids_;  // of what text may turn into
    std::size_t longest_piece_ = 0;
    // Lengths of user-defined tokens by their first byte, longest first.
    std::array<std::vector<std::size_t>, 256> user_defined_lengths_;
    std::array<std::int32_t, 256> byte_ids_{};
    bool byte_fallback_ = false;  // all 256 byte tokens exist
    std::int32_t bos_id_ = -1;
    std::int32_t eos_id_ = -1;
    std::int32_t unk_id_ = -1;
    bool add_bos_ = true;
    bool add_space_prefix_ = true;
    bool remove_extra_whitespaces_ = false;
};

// Joins tokens into text piece by piece, holding back bytes until they make a whole character.
class StreamDecoder {
public:
    // `pending`: the first bytes of a character cut in two, if the text ends with some.
    StreamDecoder(const Tokenizer& tokenizer, bool at_start, std::string pending = {})
        : tokenizer_(&tokenizer), at_start_(at_start), pending_(std::move(pending)) {}
    bool at_start() const { return at_start_; }
    const std::string& pending() const { return pending_; }
    // What became certain with this token: whole UTF-8 characters, possibly none. Malformed bytes
    // come out as U+FFFD, exactly as decoding the whole text with replacement would give (one for
    // each longest part of a character, the policy of the Unicode standard and of Python).
    std::string push(std::int32_t token);
    // What is left: an unfinished character becomes U+FFFD.
    std::string finish();
    // Whether the text can still become whole characters after this token.
    bool keeps_whole(std::int32_t token) const;
    // All tokens for which it cannot; none where no other could be drawn, because its logit is
    // minus infinity.
    void find_breaking(const float* logits, std::vector<std::int32_t>* breaking) const;

private:
    std::string take(bool last);

    const Tokenizer* tokenizer_;
    bool at_start_;
    std::string pending_;
};

}  // namespace tinyllama

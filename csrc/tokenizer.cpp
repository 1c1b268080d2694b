#include "tokenizer.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <queue>
#include <utility>

#include "byte_reader.h"
#include "gguf.h"
#include "hash.h"
#include "status.h"
#include "utf8.h"

namespace tinyllama {

namespace {

constexpr std::string_view space_symbol = "\xe2\x96\x81";       // U+2581, stands for a space
constexpr std::string_view unknown_surface = " \xe2\x81\x87 ";  // what sentencepiece prints

// The value of a byte token's text "<0xHH>", -1 for any other text.
int byte_value(std::string_view piece) {
    constexpr std::string_view digits = "0123456789ABCDEF";
    if (piece.size() != 6 || !starts_with(piece, "<0x") || piece[5] != '>') return -1;
    const std::size_t high = digits.find(piece[3]);
    const std::size_t low = digits.find(piece[4]);
    if (high == std::string_view::npos || low == std::string_view::npos) return -1;
    return static_cast<int>(high * 16 + low);
}

[[noreturn]] void refuse(const GgufFile& file, const std::string& message) {
    throw Error(Status::format_error, file.name() + ": " + message);
}

bool read_flag(const GgufFile& file, const char* key, bool otherwise) {
    return file.has(key) ? file.get_bool(key) : otherwise;
}

}  // namespace

// --- vocabulary ---------------------------------------------------------------------------------

Tokenizer::Tokenizer(const GgufFile& file) {
    const std::string& model = file.get_string("tokenizer.ggml.model");
    if (model != "llama") {
        refuse(file, "tokenizer.ggml.model is " + quoted(model) +
                         "; only 'llama' (SentencePiece BPE) is known");
    }
    if (file.has("tokenizer.ggml.precompiled_charsmap")) {
        refuse(file,
               "tokenizer.ggml.precompiled_charsmap: a tokenizer that rewrites characters"
               " is not known");
    }
    read_pieces(file);
    read_special(file);
    index_pieces(file);
    index_characters();
}

std::uint64_t Tokenizer::hash() const {
    Hasher hasher;
    for (std::size_t i = 0; i < pieces_.size(); ++i) {
        hasher.add(pieces_[i]);
        hasher.add_number(scores_[i]);
        hasher.add_number(static_cast<std::uint8_t>(types_[i]));
    }
    for (const std::int32_t id : {bos_id_, eos_id_, unk_id_})
        hasher.add_number(id);
    for (const bool rule : {add_bos_, add_space_prefix_, remove_extra_whitespaces_})
        hasher.add_number(static_cast<std::uint8_t>(rule));
    return hasher.result();
}

void Tokenizer::read_pieces(const GgufFile& file) {
    pieces_ = file.get_strings("tokenizer.ggml.tokens");
    const std::vector<double>& scores = file.get_floats("tokenizer.ggml.scores");
    const std::vector<std::int64_t>& types = file.get_ints("tokenizer.ggml.token_type");
    const std::size_t n = pieces_.size();
    if (n == 0 || n > static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max())) {
        refuse(file, "tokenizer.ggml.tokens has " + std::to_string(n) + " tokens");
    }
    if (scores.size() != n || types.size() != n) {
        refuse(file, "tokenizer.ggml.tokens has " + std::to_string(n) +
                         " items, tokenizer.ggml.scores " + std::to_string(scores.size()) +
                         ", tokenizer.ggml.token_type " + std::to_string(types.size()) +
                         "; they must be as many");
    }
    scores_.reserve(n);
    types_.reserve(n);
    for (std::size_t i = 0; i < n; ++i) {
        const auto score = static_cast<float>(scores[i]);
        if (!std::isfinite(score)) {
            refuse(file, "tokenizer.ggml.scores: the score of token " + std::to_string(i) + " is " +
                             number_text(static_cast<double>(score)));
        }
        if (types[i] < 1 || types[i] > 6) {
            refuse(file, "tokenizer.ggml.token_type: the type of token " + std::to_string(i) +
                             " is " + std::to_string(types[i]) + "; known are 1 to 6");
        }
        scores_.push_back(score);
        types_.push_back(static_cast<TokenType>(types[i]));
    }
}

void Tokenizer::read_special(const GgufFile& file) {
    const auto read_id = [&](const char* key) -> std::int32_t {
        if (!file.has(key)) return -1;
        const std::int64_t id = file.get_int(key);
        if (id < 0 || id >= vocab_size()) {
            refuse(file, std::string(key) + " is " + std::to_string(id) + ", outside the " +
                             std::to_string(vocab_size()) + " tokens");
        }
        return static_cast<std::int32_t>(id);
    };
    bos_id_ = read_id("tokenizer.ggml.bos_token_id");
    eos_id_ = read_id("tokenizer.ggml.eos_token_id");
    unk_id_ = read_id("tokenizer.ggml.unknown_token_id");
    read_id("tokenizer.ggml.padding_token_id");  // checked only: nothing here pads
    if (unk_id_ < 0) {
        const auto found = std::find(types_.begin(), types_.end(), TokenType::unknown);
        if (found != types_.end()) unk_id_ = static_cast<std::int32_t>(found - types_.begin());
    }
    add_bos_ = read_flag(file, "tokenizer.ggml.add_bos_token", true) && bos_id_ >= 0;
    add_space_prefix_ = read_flag(file, "tokenizer.ggml.add_space_prefix", true);
    remove_extra_whitespaces_ = read_flag(file, "tokenizer.ggml.remove_extra_whitespaces", false);
}

void Tokenizer::index_characters() {
    for (std::int32_t token = 0; token < vocab_size(); ++token) {
        const std::string& bytes = bytes_[static_cast<std::size_t>(token)];
        if (!begins_utf8(bytes)) breaking_.push_back(token);
        const bool in_the_middle =
            !bytes.empty() && (static_cast<unsigned char>(bytes[0]) & 0xc0) == 0x80;
        if (in_the_middle) continuing_.push_back(token);
    }
}

void Tokenizer::index_pieces(const GgufFile& file) {
    byte_ids_.fill(-1);
    bytes_.resize(pieces_.size());
    for (std::size_t i = 0; i < pieces_.size(); ++i) {
        const std::string& piece = pieces_[i];
        const auto id = static_cast<std::int32_t>(i);
        switch (types_[i]) {
            case TokenType::control:
                break;
            case TokenType::unknown:
                bytes_[i] = unknown_surface;
                break;
            case TokenType::byte: {
                const int value = byte_value(piece);
                if (value < 0) {
                    refuse(file, "tokenizer.ggml.tokens: token " + std::to_string(i) +
                                     " is of type byte, but reads " + quoted(piece) +
                                     " instead of '<0xHH>'");
                }
                bytes_[i] = static_cast<char>(value);
                std::int32_t& byte_id = byte_ids_[static_cast<std::size_t>(value)];
                if (byte_id < 0) byte_id = id;
                break;
            }
            default:
                append_replaced(piece, space_symbol, " ", &bytes_[i]);
                if (piece.empty()) break;
                ids_.emplace(piece, id);
                longest_piece_ = std::max(longest_piece_, piece.size());
                if (types_[i] == TokenType::user_defined) {
                    const auto first = static_cast<unsigned char>(piece[0]);
                    user_defined_lengths_[first].push_back(piece.size());
                }
        }
    }
    for (std::vector<std::size_t>& lengths : user_defined_lengths_) {
        std::sort(lengths.begin(), lengths.end(), std::greater<>());
        lengths.erase(std::unique(lengths.begin(), lengths.end()), lengths.end());
    }
    byte_fallback_ = *std::min_element(byte_ids_.begin(), byte_ids_.end()) >= 0;
    if (!byte_fallback_ && unk_id_ < 0) {
        refuse(file,
               "tokenizer.ggml.tokens has neither an unknown token nor all 256 byte tokens,"
               " so some text has no tokens");
    }
}

std::int32_t Tokenizer::find(std::string_view piece) const {
    if (piece.size() > longest_piece_) return -1;
    const auto found = ids_.find(piece);
    return found == ids_.end() ? -1 : found->second;
}

void Tokenizer::check_token(std::int32_t token) const {
    if (token < 0 || token >= vocab_size()) {
        throw Error(Status::invalid_argument, "token " + std::to_string(token) +
                                                  " is outside the vocabulary of " +
                                                  std::to_string(vocab_size()));
    }
}

// --- text to tokens -----------------------------------------------------------------------------

struct Tokenizer::Unit {
    std::string_view text;
    std::size_t size;  // bytes it takes of the input
};

// The length of the longest user-defined token that `text` begins with, 0 for none.
std::size_t Tokenizer::user_defined_length(std::string_view text) const {
    for (const std::size_t length : user_defined_lengths_[static_cast<unsigned char>(text[0])]) {
        if (length > text.size()) continue;
        const std::int32_t id = find(text.substr(0, length));
        if (id >= 0 && types_[static_cast<std::size_t>(id)] == TokenType::user_defined) {
            return length;
        }
    }
    return 0;
}

Tokenizer::Unit Tokenizer::next_unit(std::string_view text) const {
    const std::size_t length = user_defined_length(text);
    if (length > 0) return {text.substr(0, length), length};
    const Character character = first_character(text);
    // Like sentencepiece: one U+FFFD for each byte that begins no character.
    if (character.kind != Character::whole) return {replacement, 1};
    return {text.substr(0, character.size), character.size};
}

// What sentencepiece's normaliser does without a table of characters to rewrite: spaces become
// U+2581, one is put before the text, and where the vocabulary asks for it, runs of spaces shrink
// to one and those at both ends go.
std::string Tokenizer::normalize(std::string_view text, bool at_start) const {
    if (remove_extra_whitespaces_ && at_start) {
        while (!text.empty() && next_unit(text).text == " ")
            text.remove_prefix(1);
    }
    std::string result;
    if (text.empty()) return result;
    result.reserve(text.size() + text.size() / 2);
    if (add_space_prefix_ && at_start) result += space_symbol;
    bool after_space = remove_extra_whitespaces_ && at_start;
    while (!text.empty()) {
        Unit unit = next_unit(text);
        while (after_space && starts_with(unit.text, " "))
            unit.text.remove_prefix(1);
        if (!unit.text.empty()) {
            append_replaced(unit.text, " ", space_symbol, &result);
            after_space = remove_extra_whitespaces_ && unit.text.back() == ' ';
        }
        text.remove_prefix(unit.size);
    }
    if (remove_extra_whitespaces_) {
        while (result.size() >= space_symbol.size() &&
               result.compare(result.size() - space_symbol.size(), space_symbol.size(),
                              space_symbol) == 0) {
            result.resize(result.size() - space_symbol.size());
        }
    }
    return result;
}

// Starts from single characters and joins, again and again, the neighbours whose joint text is
// the token with the highest score, the leftmost of equals.
struct Tokenizer::Merge {
    struct Symbol {
        std::int32_t prev;  // -1: none; likewise next
        std::int32_t next;
        std::string_view text;  // empty once joined to the symbol on its left
        bool fixed;             // user-defined: never joined
    };
    struct Pair {
        float score;
        std::int32_t left;
        std::int32_t right;
        std::uint32_t size;  // of the joint text: tells whether a symbol has changed since
        bool operator<(const Pair& other) const {
            return score != other.score ? score < other.score : left > other.left;
        }
    };

    const Tokenizer& tokenizer;
    std::vector<Symbol> symbols;
    std::priority_queue<Pair> agenda;
    // How the text of an unused token was last put together, to take it apart again.
    std::unordered_map<std::int32_t, std::pair<std::string_view, std::string_view>> parts;
    std::vector<std::int32_t>& tokens;
    bool after_unknown = false;

    void split(std::string_view text) {
        while (!text.empty()) {
            std::size_t length = tokenizer.user_defined_length(text);
            const bool fixed = length > 0;
            if (!fixed) length = first_character(text).size;
            const auto index = static_cast<std::int32_t>(symbols.size());
            symbols.push_back({index - 1, index + 1, text.substr(0, length), fixed});
            text.remove_prefix(length);
        }
        symbols.back().next = -1;
    }

    void propose(std::int32_t left, std::int32_t right) {
        if (left < 0 || right < 0) return;
        const Symbol& a = symbols[static_cast<std::size_t>(left)];
        const Symbol& b = symbols[static_cast<std::size_t>(right)];
        if (a.fixed || b.fixed) return;
        const std::string_view joint(a.text.data(), a.text.size() + b.text.size());
        const std::int32_t id = tokenizer.find(joint);
        if (id < 0) return;
        const auto index = static_cast<std::size_t>(id);
        agenda.push(
            {tokenizer.scores_[index], left, right, static_cast<std::uint32_t>(joint.size())});
        if (tokenizer.types_[index] == TokenType::unused) parts[id] = {a.text, b.text};
    }

    void join_all() {
        for (std::size_t i = 1; i < symbols.size(); ++i) {
            const auto right = static_cast<std::int32_t>(i);
            propose(right - 1, right);
        }
        while (!agenda.empty()) {
            const Pair pair = agenda.top();
            agenda.pop();
            Symbol& left = symbols[static_cast<std::size_t>(pair.left)];
            Symbol& right = symbols[static_cast<std::size_t>(pair.right)];
            if (left.text.empty() || right.text.empty() ||
                left.text.size() + right.text.size() != pair.size) {
                continue;
            }
            left.text = {left.text.data(), pair.size};
            right.text = {};
            left.next = right.next;
            if (left.next >= 0) symbols[static_cast<std::size_t>(left.next)].prev = pair.left;
            propose(left.prev, pair.left);
            propose(pair.left, left.next);
        }
    }

    // Tokens of one symbol: its own, or those of the parts where it is unused, or its bytes.
    void emit(std::string_view text) {
        std::vector<std::string_view> stack{text};
        while (!stack.empty()) {
            const std::string_view part = stack.back();
            stack.pop_back();
            const std::int32_t id = tokenizer.find(part);
            const auto unused = parts.find(id);
            if (id >= 0 && unused != parts.end()) {
                stack.push_back(unused->second.second);
                stack.push_back(unused->second.first);
            } else if (id >= 0) {
                tokens.push_back(id);
            } else if (tokenizer.byte_fallback_) {
                for (const char c : part) {
                    tokens.push_back(tokenizer.byte_ids_[static_cast<unsigned char>(c)]);
                }
            } else if (!after_unknown) {  // a run of unknown characters is one token
                tokens.push_back(tokenizer.unk_id_);
            }
            after_unknown = id < 0 && !tokenizer.byte_fallback_;
        }
    }
};

std::vector<std::int32_t> Tokenizer::encode(std::string_view text, bool bos, bool eos,
                                            bool at_start) const {
    if (text.size() > static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max()) / 4) {
        throw Error(Status::invalid_argument,
                    "the text has " + std::to_string(text.size()) + " bytes; encode it in parts");
    }
    std::vector<std::int32_t> tokens;
    if (bos && bos_id_ >= 0) tokens.push_back(bos_id_);
    const std::string normalized = normalize(text, at_start);
    if (!normalized.empty()) {
        Merge merge{*this, {}, {}, {}, tokens};
        merge.split(normalized);
        merge.join_all();
        for (std::int32_t i = 0; i >= 0; i = merge.symbols[static_cast<std::size_t>(i)].next) {
            merge.emit(merge.symbols[static_cast<std::size_t>(i)].text);
        }
    }
    if (eos && eos_id_ >= 0) tokens.push_back(eos_id_);
    return tokens;
}

// --- tokens to text -----------------------------------------------------------------------------

const std::string& Tokenizer::token_bytes(std::int32_t token) const {
    check_token(token);
    return bytes_[static_cast<std::size_t>(token)];
}

void Tokenizer::append(std::int32_t token, bool* at_start, std::string* text) const {
    check_token(token);
    const auto index = static_cast<std::size_t>(token);
    std::string_view bytes = bytes_[index];
    const bool has_space = types_[index] != TokenType::control &&
                           types_[index] != TokenType::unknown &&
                           starts_with(pieces_[index], space_symbol);
    if (*at_start && has_space && (add_space_prefix_ || remove_extra_whitespaces_)) {
        bytes.remove_prefix(1);
        // Where spaces were removed, none can begin the text: go on dropping until there is some.
        *at_start = remove_extra_whitespaces_;
    }
    if (!bytes.empty()) *at_start = false;
    text->append(bytes);
}

std::string Tokenizer::decode(const std::vector<std::int32_t>& tokens, bool at_start) const {
    std::string text;
    for (const std::int32_t token : tokens)
        append(token, &at_start, &text);
    return text;
}

std::string StreamDecoder::push(std::int32_t token) {
    tokenizer_->append(token, &at_start_, &pending_);
    return take(false);
}

std::string StreamDecoder::finish() { return take(true); }

bool StreamDecoder::keeps_whole(std::int32_t token) const {
    const auto contains = [token](const std::vector<std::int32_t>& tokens) {
        return std::binary_search(tokens.begin(), tokens.end(), token);
    };
    if (pending_.empty()) return !contains(tokenizer_->breaking());
    return contains(tokenizer_->continuing()) &&
           begins_utf8(pending_ + tokenizer_->token_bytes(token));
}

void StreamDecoder::find_breaking(const float* logits, std::vector<std::int32_t>* breaking) const {
    constexpr float never = -std::numeric_limits<float>::infinity();
    breaking->clear();
    if (pending_.empty()) *breaking = tokenizer_->breaking();
    auto next = breaking->begin();
    bool one_is_left = false;
    for (std::int32_t token = 0; token < tokenizer_->vocab_size(); ++token) {
        if (!pending_.empty() && !keeps_whole(token)) {
            breaking->push_back(token);
        } else if (pending_.empty() && next != breaking->end() && *next == token) {
            ++next;
        } else {
            one_is_left = one_is_left || logits[token] > never;
            if (pending_.empty() && one_is_left) return;
        }
    }
    if (!one_is_left) breaking->clear();
}

// Whole characters from the front of what is pending; all of it when it is the last.
std::string StreamDecoder::take(bool last) {
    std::string text;
    std::string_view rest = pending_;
    while (!rest.empty()) {
        const Character character = first_character(rest);
        if (character.kind == Character::cut && !last) break;
        text += character.kind == Character::whole ? rest.substr(0, character.size) : replacement;
        rest.remove_prefix(character.size);
    }
    pending_ = std::string(rest);
    return text;
}

}  // namespace tinyllama

// Small functions over UTF-8 text.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace tinyllama {

constexpr std::string_view replacement = "\xef\xbf\xbd";  // U+FFFD, stands for malformed bytes

// The character at the start of a text: its length, or where it is malformed or cut off by the
// end, the length of the longest part that could begin a character (Unicode, table 3-7).
struct Character {
    enum { whole, malformed, cut } kind;
    std::size_t size;
};

inline Character first_character(std::string_view text) {
    const auto byte = [text](std::size_t i) { return static_cast<unsigned char>(text[i]); };
    const unsigned char lead = byte(0);
    if (lead < 0x80) return {Character::whole, 1};
    if (lead < 0xc2 || lead > 0xf4) return {Character::malformed, 1};
    const std::size_t size = lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
    // Some limit the second byte further: no overlong forms, surrogates, or beyond U+10FFFF.
    unsigned char least = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
    unsigned char most = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
    for (std::size_t i = 1; i < size; ++i) {
        if (i == text.size()) return {Character::cut, i};
        if (byte(i) < least || byte(i) > most) return {Character::malformed, i};
        least = 0x80;
        most = 0xbf;
    }
    return {Character::whole, size};
}

inline bool is_utf8(std::string_view text) {
    while (!text.empty()) {
        const Character character = first_character(text);
        if (character.kind != Character::whole) return false;
        text.remove_prefix(character.size);
    }
    return true;
}

inline bool starts_with(std::string_view text, std::string_view prefix) {
    return text.substr(0, prefix.size()) == prefix;
}

// As is_utf8, but the end may cut a character short.
inline bool begins_utf8(std::string_view text) {
    while (!text.empty()) {
        const Character character = first_character(text);
        if (character.kind == Character::malformed) return false;
        text.remove_prefix(character.size);
    }
    return true;
}

// Appends `text` with every `from` replaced by `to`.
inline void append_replaced(std::string_view text, std::string_view from, std::string_view to,
                            std::string* out) {
    for (std::size_t begin = 0;;) {
        const std::size_t end = text.find(from, begin);
        out->append(text.substr(begin, end - begin));
        if (end == std::string_view::npos) return;
        out->append(to);
        begin = end + from.size();
    }
}

}  // namespace tinyllama

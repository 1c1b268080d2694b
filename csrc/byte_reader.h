// Steps through the header of a binary file: every read is checked against what is left, and a
// failed one says where it stood and what it was reading.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <type_traits>

#include "status.h"

namespace tinyllama {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "files are read in place: little-endian");

// Bytes from a file, made fit for a message: in quotes, printable ASCII kept, the rest as \xHH,
// long ones cut.
inline std::string quoted(std::string_view bytes) {
    constexpr std::size_t longest = 80;
    constexpr char hex[] = "0123456789abcdef";
    std::string text = "'";
    for (const char c : bytes.substr(0, longest)) {
        const auto byte = static_cast<unsigned char>(c);
        if (byte >= 0x20 && byte < 0x7f) {
            text += c;
        } else {
            text += {'\\', 'x', hex[byte >> 4], hex[byte & 15]};
        }
    }
    return text + (bytes.size() > longest ? "...'" : "'");
}

class ByteReader {
public:
    // No header needs more; it bounds what a hostile one can make us allocate.
    static constexpr std::uint64_t max_header_bytes = 100'000'000;

    ByteReader(ByteSpan bytes, const std::string& file) : bytes_(bytes), file_(file) {}

    std::uint64_t pos() const { return pos_; }
    // The entry that the next reads belong to; the name must outlive them.
    void set_subject(const char* kind, std::string_view name) {
        kind_ = kind;
        subject_ = name;
    }

    [[noreturn]] void fail(const std::string& message) const {
        throw Error(Status::format_error, file_ + ": " + message);
    }
    // "offset of tensor 'x'", or `what` alone outside any entry.
    std::string about(const std::string& what) const {
        if (kind_ == nullptr) return what;
        return what + " of " + kind_ + " " + quoted(subject_);
    }

    template <typename T>
    T number(const char* what) {
        static_assert(std::is_arithmetic_v<T> && !std::is_same_v<T, bool>);
        T value;
        std::memcpy(&value, take(sizeof(T), what).data(), sizeof(T));
        return value;
    }

    bool boolean(const char* what) {
        const auto value = number<std::uint8_t>(what);
        if (value > 1) {
            fail(about(what) + " is " + std::to_string(value) + "; a bool must be 0 or 1");
        }
        return value == 1;
    }

    // A uint64 length and as many bytes. The view lasts as long as the file's bytes.
    std::string_view string(const char* what, std::uint64_t limit = max_header_bytes) {
        const auto length = number<std::uint64_t>(what);
        check_count(length, 1, what);
        if (length > limit) {
            fail(about(what) + " has " + std::to_string(length) + " bytes; at most " +
                 std::to_string(limit) + " are allowed");
        }
        return take(length, what);
    }

    // Refuses a count of items that cannot lie in the bytes that are left.
    void check_count(std::uint64_t count, std::uint64_t item_bytes, const char* what) const {
        if (count > (bytes_.size - pos_) / item_bytes) {
            fail("truncated: the file ends at byte " + std::to_string(bytes_.size) + ", but the " +
                 about(what) + " at byte " + std::to_string(pos_) + " claims " +
                 std::to_string(count) + (item_bytes == 1 ? " bytes" : " items"));
        }
        if (count > (max_header_bytes - pos_) / item_bytes) fail_too_long();
    }

    std::string_view take(std::uint64_t count, const char* what) {
        if (count > bytes_.size - pos_) {
            fail("truncated: the file ends at byte " + std::to_string(bytes_.size) +
                 ", reading the " + about(what) + " at byte " + std::to_string(pos_));
        }
        if (count > max_header_bytes - pos_) fail_too_long();
        const auto* start = reinterpret_cast<const char*>(bytes_.data + pos_);
        pos_ += count;
        return {start, static_cast<std::size_t>(count)};
    }

private:
    [[noreturn]] void fail_too_long() const {
        fail("the header is longer than " + std::to_string(max_header_bytes) + " bytes");
    }

    ByteSpan bytes_;
    const std::string& file_;
    std::uint64_t pos_ = 0;  // never above bytes_.size nor max_header_bytes
    const char* kind_ = nullptr;
    std::string_view subject_;
};

}  // namespace tinyllama

// Status codes, the one exception type of the core, and checked integer arithmetic.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>

namespace tinyllama {

enum class Status : int {
    ok = 0,
    format_error = 1,      // a file is not what it claims to be
    config_error = 2,      // a hyperparameter is out of range or contradicts another
    invalid_argument = 3,  // an argument of a call is out of range
    context_full = 4,      // the tokens do not fit into what is left of the context
    nonfinite = 5,         // NaN or infinity in weights or logits
    busy = 6,              // a session is in use by another thread
    io_error = 7,          // the operating system refused
};

class Error : public std::runtime_error {
public:
    Error(Status code, const std::string& message) : std::runtime_error(message), code_(code) {}
    Status code() const noexcept { return code_; }

private:
    Status code_;
};

// A number in a message: the same in every locale.
inline std::string number_text(double value) {
    char text[32];
    std::snprintf(text, sizeof(text), "%.6g", value);
    std::string result = text;
    for (char& c : result)
        if (c == ',') c = '.';
    return result;
}

// A view of bytes that somebody else keeps alive.
struct ByteSpan {
    const std::uint8_t* data = nullptr;
    std::size_t size = 0;
};

// Products and sums of sizes read from files: false when the result does not fit.
inline bool checked_mul(std::uint64_t a, std::uint64_t b, std::uint64_t* result) {
    return !__builtin_mul_overflow(a, b, result);
}
inline bool checked_add(std::uint64_t a, std::uint64_t b, std::uint64_t* result) {
    return !__builtin_add_overflow(a, b, result);
}

}  // namespace tinyllama

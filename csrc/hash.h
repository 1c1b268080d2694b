// XXH64 (Collet, "xxHash fast digest algorithm"): 64 bits that tell files apart and show damage.
// Not against an adversary.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <type_traits>

#include "status.h"

namespace tinyllama {

std::uint64_t hash64(ByteSpan bytes, std::uint64_t seed = 0);

// The same over pieces, each with its length, one after the other.
class Hasher {
public:
    void add(ByteSpan bytes) { state_ = hash64(bytes, state_ + bytes.size); }
    void add(std::string_view text) {
        add(ByteSpan{reinterpret_cast<const std::uint8_t*>(text.data()), text.size()});
    }
    template <typename T>
    void add_number(T value) {
        static_assert(std::is_arithmetic_v<T>);
        add(ByteSpan{reinterpret_cast<const std::uint8_t*>(&value), sizeof(value)});
    }
    std::uint64_t result() const { return state_; }

private:
    std::uint64_t state_ = 0;
};

}  // namespace tinyllama

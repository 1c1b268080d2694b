#include "hash.h"

#include <cstring>

namespace tinyllama {
namespace {

constexpr std::uint64_t prime1 = 0x9E3779B185EBCA87u;
constexpr std::uint64_t prime2 = 0xC2B2AE3D27D4EB4Fu;
constexpr std::uint64_t prime3 = 0x165667B19E3779F9u;
constexpr std::uint64_t prime4 = 0x85EBCA77C2B2AE63u;
constexpr std::uint64_t prime5 = 0x27D4EB2F165667C5u;

std::uint64_t rotate(std::uint64_t x, int n) { return (x << n) | (x >> (64 - n)); }

template <typename T>
T load(const std::uint8_t* bytes) {
    T value;
    std::memcpy(&value, bytes, sizeof(value));
    return value;
}

std::uint64_t round(std::uint64_t lane, std::uint64_t input) {
    return rotate(lane + input * prime2, 31) * prime1;
}

}  // namespace

std::uint64_t hash64(ByteSpan bytes, std::uint64_t seed) {
    const std::uint8_t* p = bytes.data;
    std::size_t left = bytes.size;
    std::uint64_t h = seed + prime5;
    if (left >= 32) {
        std::uint64_t lanes[4] = {seed + prime1 + prime2, seed + prime2, seed, seed - prime1};
        for (; left >= 32; p += 32, left -= 32) {
            for (int i = 0; i < 4; ++i)
                lanes[i] = round(lanes[i], load<std::uint64_t>(p + 8 * i));
        }
        h = rotate(lanes[0], 1) + rotate(lanes[1], 7) + rotate(lanes[2], 12) + rotate(lanes[3], 18);
        for (const std::uint64_t lane : lanes)
            h = (h ^ round(0, lane)) * prime1 + prime4;
    }
    h += bytes.size;
    for (; left >= 8; p += 8, left -= 8)
        h = rotate(h ^ round(0, load<std::uint64_t>(p)), 27) * prime1 + prime4;
    for (; left >= 4; p += 4, left -= 4)
        h = rotate(h ^ (load<std::uint32_t>(p) * prime1), 23) * prime2 + prime3;
    for (; left > 0; ++p, --left)
        h = rotate(h ^ (*p * prime5), 11) * prime1;
    h = (h ^ (h >> 33)) * prime2;
    h = (h ^ (h >> 29)) * prime3;
    return h ^ (h >> 32);
}

}  // namespace tinyllama

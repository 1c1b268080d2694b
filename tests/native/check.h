// What the parts of check_kernels share: the sets under test, random numbers, comparisons.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "../fuzz/mutant.h"
#include "kernels/kernel_table.h"

namespace check {

using fuzz::Random;
using tinyllama::KernelTable;

constexpr double u = 0x1p-24;          // the most that one rounding changes, relatively
constexpr double smallest = 0x1p-126;  // normal number

// What all parts of the program add to.
struct Run {
    const KernelTable* generic = nullptr;
    std::vector<const KernelTable*> sets;        // compared with generic; it is one of them
    std::uint64_t digest = 0xcbf29ce484222325u;  // FNV-1a of all that generic computed
    std::uint64_t n_results = 0;
    int n_failures = 0;

    void fail(const std::string& what, std::size_t at, double got, double want) {
        if (++n_failures > 20) return;
        std::printf("FAILED: %s: element %zu is %.9g, not %.9g\n", what.c_str(), at, got, want);
    }
    void expect_near(const std::string& what, std::size_t at, double got, double want,
                     double bound) {
        if (!(std::fabs(got - want) <= bound)) fail(what + " against float64", at, got, want);
    }
    // Bit for bit, all NaNs being one.
    template <typename T>
    void expect_same(const std::string& what, const std::vector<T>& got,
                     const std::vector<T>& want) {
        for (std::size_t i = 0; i < want.size(); ++i) {
            const bool nan = got[i] != got[i] && want[i] != want[i];
            if (nan || std::memcmp(&got[i], &want[i], sizeof(T)) == 0) continue;
            fail(what, i, static_cast<double>(got[i]), static_cast<double>(want[i]));
            return;
        }
    }
    // Adds what generic computed to the digest.
    template <typename T>
    void note(const std::vector<T>& results) {
        for (const T& x : results) {
            unsigned char bytes[sizeof(T)] = {};
            if (x == x) std::memcpy(bytes, &x, sizeof(T));
            for (const unsigned char byte : bytes)
                digest = (digest ^ byte) * 0x100000001b3u;
        }
        n_results += results.size();
    }
};

// Numbers of every day; numbers whose products lie around the smallest normal number, and subnormal
// ones; numbers of every day among which is, now and then, any float, infinite and NaN too.
enum class Kind { plain, tiny, wild };

inline std::size_t size(std::int64_t n) { return static_cast<std::size_t>(n); }
inline std::int64_t below(Random& random, std::int64_t n) {
    return static_cast<std::int64_t>(random.below(size(n)));
}

inline float from_bits(std::uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof(x));
    return x;
}
inline double from_bf16(std::uint16_t x) {
    return static_cast<double>(from_bits(static_cast<std::uint32_t>(x) << 16));
}

inline float draw(Random& random, Kind kind) {
    const auto bits = static_cast<std::uint32_t>(random.next());
    if (kind == Kind::wild && random.one_in(64)) return from_bits(bits);
    if (kind == Kind::tiny) {
        const std::size_t exponent = random.one_in(4) ? 0 : 60 + random.below(9);
        return from_bits((bits & 0x807fffffu) | static_cast<std::uint32_t>(exponent) << 23);
    }
    return (static_cast<float>(bits >> 8) * 0x1p-23f - 1.0f) *
           static_cast<float>(1 << random.below(4));
}

inline std::vector<float> draws(Random& random, Kind kind, std::int64_t n) {
    std::vector<float> out(size(n));
    for (float& x : out)
        x = draw(random, kind);
    return out;
}

void check_matmuls(Run& run, Random& random);
void check_attention(Run& run, Random& random);

}  // namespace check

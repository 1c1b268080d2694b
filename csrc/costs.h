// What pieces of work have cost so far, and what the next ones will.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

namespace tinyllama {

using Clock = std::chrono::steady_clock;
using Seconds = std::chrono::duration<double>;

// A piece of work: attention, feed_forward and output are those of a forward pass, for n rows; n
// draws of tokens are one as well, copies of n blocks of a cache, and steps of n elections.
// `amount` is in units that a piece's cost grows with.
struct Work {
    enum class Kind : std::uint8_t { attention, feed_forward, output, draw, copy, elect };
    Kind kind;
    std::int64_t n;
    std::int64_t amount;
};

// For every kind, and n up to each power of two, the time per amount as a running mean and mean
// deviation: the way TCP estimates round trips (Jacobson 1988).
class Costs {
public:
    // On the careful side: 0 as long as nothing of the kind is known.
    Seconds estimate(const Work& work) const;

    // Several pieces took so long together.
    void learn(const std::vector<Work>& pieces, Seconds elapsed);

    // A piece was found too dear. What is never tried is never measured again: so it is thought a
    // little cheaper each time, until it is tried.
    void doubt(const Work& work);

private:
    struct Rate {
        double mean = 0;  // seconds per amount
        double deviation = 0;
        std::int64_t n_seen = 0;
    };
    using Rates = std::array<Rate, 10>;

    const Rate* nearest(const Work& work) const;
    Rate& own(const Work& work);

    std::array<Rates, 6> rates_;
};

// When a step has to be over.
struct Budget {
    static constexpr Seconds unlimited{std::numeric_limits<double>::infinity()};

    explicit Budget(Seconds all) : whole(all), start(Clock::now()) {}
    bool limited() const { return whole < unlimited; }
    Seconds left() const { return limited() ? Seconds(whole - (Clock::now() - start)) : unlimited; }

    Seconds whole;
    Clock::time_point start;
    bool untouched = true;  // nothing was done yet
};

}  // namespace tinyllama

#include "costs.h"

#include <algorithm>
#include <cmath>

namespace tinyllama {
namespace {

constexpr double weight = 1.0 / 8;  // of the latest piece in the running means
constexpr double n_deviations = 2;
constexpr double first_deviation = 0.25;  // of the mean, after a single piece
// One stop of the machine says little about the next piece.
constexpr double most_at_once = 4;

}  // namespace

// Fewer rows cost more each: a rate taken from more rows may be too low, one from fewer too high.
// So the nearest below is taken first.
const Costs::Rate* Costs::nearest(const Work& work) const {
    const Rates& rates = rates_[static_cast<std::size_t>(work.kind)];
    const auto n = static_cast<std::size_t>(std::clamp<std::int64_t>(work.n, 0, max_n));
    for (std::size_t i = n + 1; i-- > 0;)
        if (rates[i].mean > 0) return &rates[i];
    for (std::size_t i = n + 1; i < rates.size(); ++i)
        if (rates[i].mean > 0) return &rates[i];
    return nullptr;
}

Seconds Costs::estimate(const Work& work) const {
    const Rate* rate = nearest(work);
    if (rate == nullptr) return Seconds(0);
    const auto amount = static_cast<double>(work.amount);
    return Seconds((rate->mean + n_deviations * rate->deviation) * amount);
}

void Costs::learn(const std::vector<Work>& pieces, Seconds elapsed) {
    double expected = 0, amount = 0;
    for (const Work& work : pieces) {
        const Rate* rate = nearest(work);
        if (rate != nullptr) expected += rate->mean * static_cast<double>(work.amount);
        amount += static_cast<double>(work.amount);
    }
    if (amount <= 0) return;
    for (const Work& work : pieces) {
        const Rate* const known = nearest(work);
        const double before = known == nullptr ? 0 : known->mean;
        // Shared out as the means had foreseen it.
        const double ratio = expected > 0 ? elapsed.count() / expected : 0;
        double seen = before > 0 ? before * ratio : elapsed.count() / amount;
        const auto n = static_cast<std::size_t>(std::clamp<std::int64_t>(work.n, 0, max_n));
        Rate& rate = rates_[static_cast<std::size_t>(work.kind)][n];
        if (rate.mean <= 0) {
            rate = {seen, first_deviation * seen};
            continue;
        }
        seen = std::min(seen, most_at_once * rate.mean);
        rate.deviation += weight * (std::fabs(seen - rate.mean) - rate.deviation);
        rate.mean += weight * (seen - rate.mean);
    }
}

void Costs::doubt(const Work& work) {
    const Rate* const rate = nearest(work);
    if (rate == nullptr) return;
    const auto n = static_cast<std::size_t>(std::clamp<std::int64_t>(work.n, 0, max_n));
    rates_[static_cast<std::size_t>(work.kind)][n] = {0.95 * rate->mean, 0.5 * rate->deviation};
}

}  // namespace tinyllama

#include "costs.h"

#include <algorithm>
#include <cmath>

namespace tinyllama {
namespace {

constexpr double n_deviations = 2;
constexpr double first_deviation = 0.25;  // of the mean, after a single piece
// The share of the latest piece in the running means falls to this.
constexpr double least_weight = 1.0 / 16;
// One stop of the machine says little about the next piece.
constexpr double most_at_once = 3;

// 1, 2, 3 to 4, 5 to 8, and so on: within one of them, what a row costs differs by less than twice.
std::size_t bucket(std::int64_t n) {
    std::size_t result = 0;
    while ((std::int64_t{1} << result) < n)
        ++result;
    return result;
}

}  // namespace

// Fewer rows cost more each: a rate taken from more rows may be too low, one from fewer too high.
// So the nearest below is taken first.
const Costs::Rate* Costs::nearest(const Work& work) const {
    const Rates& rates = rates_[static_cast<std::size_t>(work.kind)];
    const std::size_t mine = std::min(bucket(work.n), rates.size() - 1);
    for (std::size_t i = mine + 1; i-- > 0;)
        if (rates[i].n_seen > 0) return &rates[i];
    for (std::size_t i = mine + 1; i < rates.size(); ++i)
        if (rates[i].n_seen > 0) return &rates[i];
    return nullptr;
}

Costs::Rate& Costs::own(const Work& work) {
    Rates& rates = rates_[static_cast<std::size_t>(work.kind)];
    return rates[std::min(bucket(work.n), rates.size() - 1)];
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
    // Shared out as the means had foreseen it.
    const double ratio = std::min(elapsed.count() / expected, most_at_once);
    for (const Work& work : pieces) {
        if (work.amount <= 0) continue;
        const Rate* const known = nearest(work);
        const double seen = known == nullptr ? elapsed.count() / amount : ratio * known->mean;
        Rate& rate = own(work);
        rate.n_seen += 1;
        if (rate.n_seen == 1) {
            rate.mean = seen;
            rate.deviation = first_deviation * seen;
            continue;
        }
        const double weight = std::max(1.0 / static_cast<double>(rate.n_seen), least_weight);
        rate.deviation += weight * (std::fabs(seen - rate.mean) - rate.deviation);
        rate.mean += weight * (seen - rate.mean);
    }
}

void Costs::doubt(const Work& work) {
    const Rate* const known = nearest(work);
    if (known == nullptr) return;
    const Rate less{0.99 * known->mean, 0.9 * known->deviation, 1};
    own(work) = less;
}

}  // namespace tinyllama

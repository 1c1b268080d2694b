#include "softmax.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace tinyllama {
namespace {

constexpr float log2_e = 1.44269504f;

std::size_t n_blocks_of(std::size_t n_logits) {
    return (n_logits + logits_block - 1) / logits_block;
}

// Probabilities of a softmax: ln of one is logit - most - log_of_all.
struct Denominator {
    double most, log_of_all;

    double log_probability(float logit) const {
        return static_cast<double>(logit) - most - log_of_all;
    }
};

Denominator denominator(const KernelTable& kernels, const AlignedVector<float>& maxima,
                        const AlignedVector<float>& sums) {
    // A block weighs e^(its largest - the largest of all), computed as weights of logits are.
    const std::size_t n = n_blocks_of(maxima.size());
    AlignedVector<float> of_blocks(n * logits_block, impossible), weights(n * logits_block);
    std::copy(maxima.begin(), maxima.end(), of_blocks.begin());
    std::vector<float> unused(n);
    const float most = *std::max_element(maxima.begin(), maxima.end());
    kernels.weigh(weights.data(), unused.data(), of_blocks.data(), static_cast<std::int64_t>(n),
                  most, log2_e);
    double all = 0;
    for (std::size_t b = 0; b < sums.size(); ++b)
        all += static_cast<double>(weights[b]) * static_cast<double>(sums[b]);
    return {static_cast<double>(most), std::log(all)};
}

void sum_blocks(const KernelTable& kernels, const float* logits, const float* maxima, float* sums,
                std::size_t n_blocks) {
    alignas(64) float weights[logits_block];
    for (std::size_t b = 0; b < n_blocks; ++b)
        kernels.weigh(weights, sums + b, logits + b * logits_block, 1, maxima[b], log2_e);
}

}  // namespace

void Excerpt::clear(std::size_t vocab_size) {
    tokens_.clear();
    logits_.clear();
    maxima_.resize(n_blocks_of(vocab_size));
    sums_.resize(maxima_.size());
}

void Excerpt::ask(std::int32_t token) {
    tokens_.push_back(token);
    logits_.resize(tokens_.size());
}

std::int32_t Excerpt::take(const KernelTable& kernels, std::int64_t begin, float* logits,
                           std::int64_t n) {
    const auto first = static_cast<std::size_t>(begin) / logits_block;
    const std::size_t n_blocks = n_blocks_of(static_cast<std::size_t>(n));
    const std::int32_t largest = kernels.hand_out(logits, &maxima_[first], logits, n);
    std::fill(logits + n, logits + n_blocks * logits_block, impossible);
    sum_blocks(kernels, logits, &maxima_[first], &sums_[first], n_blocks);
    if (largest >= 0x7f800000)
        std::fill_n(&sums_[first], n_blocks, std::numeric_limits<float>::quiet_NaN());
    for (auto i = std::lower_bound(tokens_.begin(), tokens_.end(), begin); i != tokens_.end();
         ++i) {
        if (*i >= begin + n) break;
        logits_[static_cast<std::size_t>(i - tokens_.begin())] = logits[*i - begin];
    }
    return largest;
}

bool Excerpt::all_finite() const {
    return std::none_of(sums_.begin(), sums_.end(), [](float sum) { return std::isnan(sum); });
}

std::vector<Likelihood> Excerpt::likelihoods(const KernelTable& kernels) const {
    const Denominator all = denominator(kernels, maxima_, sums_);
    std::vector<Likelihood> found;
    for (const float logit : logits_)
        found.push_back({all.log_probability(logit), static_cast<double>(logit) == all.most});
    return found;
}

std::vector<double> log_probabilities(const KernelTable& kernels, const Logits& logits,
                                      const std::vector<std::int32_t>& tokens) {
    AlignedVector<float> sums(logits.maxima.size());
    sum_blocks(kernels, logits.values.data(), logits.maxima.data(), sums.data(), sums.size());
    const Denominator all = denominator(kernels, logits.maxima, sums);
    std::vector<double> found;
    for (const std::int32_t token : tokens)
        found.push_back(all.log_probability(logits.values[static_cast<std::size_t>(token)]));
    return found;
}

}  // namespace tinyllama

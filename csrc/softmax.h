// Probabilities of tokens, from sums of blocks of 64 logits. Each block is summed beside its own
// largest, so that it can be while it is in a near cache, before the largest of all is known.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "aligned_vector.h"
#include "kernels/kernel_table.h"
#include "logits.h"

namespace tinyllama {

// The natural logarithm of a probability, and whether no other token has a larger one.
struct Likelihood {
    double logprob = 0;
    bool greedy = true;
};

// Natural logarithms of the probabilities of tokens under softmax(logits).
std::vector<double> log_probabilities(const KernelTable& kernels, const Logits& logits,
                                      const std::vector<std::int32_t>& tokens);

// What some tokens' probabilities need of a row of logits, taken while they are computed, so that
// they need not be kept: the same bits as log_probabilities() of them all.
class Excerpt {
public:
    // Nothing is asked for any more.
    void clear(std::size_t vocab_size);
    // In ascending order; a token may come again.
    void ask(std::int32_t token);
    bool is_asked() const { return !tokens_.empty(); }

    // Takes its part of logits [begin, begin + n), of which begin and the room are whole blocks and
    // what is beyond n is overwritten. Several parts may be taken at once. Returns the bits of the
    // largest magnitude.
    std::int32_t take(const KernelTable& kernels, std::int64_t begin, float* logits,
                      std::int64_t n);

    // Once all parts are taken: whether all logits are finite numbers, and each token's likelihood.
    bool all_finite() const;
    std::vector<Likelihood> likelihoods(const KernelTable& kernels) const;

private:
    std::vector<std::int32_t> tokens_;
    std::vector<float> logits_;  // of the tokens
    // Of the blocks; a sum is NaN where a logit is not finite.
    AlignedVector<float> maxima_, sums_;
};

}  // namespace tinyllama

// From logits to a token: bias, penalties, temperature, top-k, top-p, min-p, and the draw.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "logits.h"

namespace tinyllama {

class StreamDecoder;

struct SamplingParams {
    float temperature = 1.0f;          // 0: the most likely token, the lowest id on ties
    std::int32_t top_k = 0;            // keep the k most likely; 0: all
    float top_p = 1.0f;                // keep the smallest set with this probability; 1: all
    float min_p = 0.0f;                // drop what is less likely than this times the likeliest
    float repetition_penalty = 1.0f;   // of every token in the timeline (Keskar, arXiv 1909.05858)
    float presence_penalty = 0.0f;     // subtracted once from tokens generated already
    float frequency_penalty = 0.0f;    // subtracted for each time a token was generated
    std::int32_t n_prompt_tokens = 0;  // where the generated part of the timeline begins
    std::vector<std::pair<std::int32_t, float>> logit_bias;  // added to the logits first
    std::vector<std::int32_t> banned;                        // never drawn
};

// Throws Error(invalid_argument) naming the parameter that is out of range or not finite.
void validate(const SamplingParams& params, std::int32_t vocab_size);

// SplitMix64 (Steele, Lea and Flood 2014) in its counter form: draw i of a seed is a pure function
// of (seed, i), so that its whole state is two numbers.
struct RandomState {
    std::uint64_t seed = 0;
    std::uint64_t n_draws = 0;
    double next_uniform();  // in [0, 1), 53 bits
};

// Draws a token from logits, all finite; they are changed and put back. Order: logit_bias, banned,
// penalties, what is not allowed, temperature, top-k, top-p, min-p, each on what the one before
// left, as transformers does. `allowed`: the only tokens that may be drawn, ascending; null: all.
// One alone is not drawn: the random state stays, and no ban counts. Probabilities are computed to
// about 3e-7; what is less likely than 3e-38 times the likeliest is never drawn. `history` is the
// whole timeline. With `text`, which shows what was generated so far, tokens that would break a
// character are never drawn. Throws Error(invalid_argument) when no token is left.
std::int32_t sample(const KernelTable& kernels, Logits& logits,
                    const std::vector<std::int32_t>& history, const SamplingParams& params,
                    RandomState& random, const StreamDecoder* text = nullptr,
                    const std::vector<std::int32_t>* allowed = nullptr);

// Draws one of several texts by the logarithms of their probabilities, by temperature, top-k, top-p
// and min-p. Throws Error(invalid_argument) when all have minus infinity.
std::size_t sample_one_of(const KernelTable& kernels, const std::vector<double>& scores,
                          const SamplingParams& params, RandomState& random);

// The n most likely tokens and their log-probabilities, best first, lowest id first on ties.
std::vector<std::pair<std::int32_t, double>> top_log_probabilities(const KernelTable& kernels,
                                                                   const Logits& logits,
                                                                   std::int32_t n);

}  // namespace tinyllama

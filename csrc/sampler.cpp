#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>
#include <unordered_map>

#include "status.h"
#include "tokenizer.h"

namespace tinyllama {
namespace {

struct Candidate {
    std::int32_t token;
    float logit;
    double probability;  // not normalised
};

bool likelier(const Candidate& a, const Candidate& b) {
    return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
}

void check_range(const char* name, float value, float least, float most) {
    if (!(value >= least && value <= most)) {  // NaN fails as well
        throw Error(Status::invalid_argument, std::string(name) + " is " + std::to_string(value) +
                                                  "; it must be in [" + std::to_string(least) +
                                                  ", " + std::to_string(most) + "]");
    }
}

void check_token(const char* name, std::int32_t token, std::int32_t vocab_size) {
    if (token < 0 || token >= vocab_size) {
        throw Error(Status::invalid_argument, std::string(name) + " has token " +
                                                  std::to_string(token) + ", outside the " +
                                                  std::to_string(vocab_size) + " tokens");
    }
}

std::vector<float> adjusted_logits(const std::vector<float>& logits,
                                   const std::vector<std::int32_t>& history,
                                   const SamplingParams& params) {
    std::vector<float> adjusted = logits;
    const auto at = [](std::int32_t token) { return static_cast<std::size_t>(token); };
    for (const auto& [token, bias] : params.logit_bias)
        adjusted[at(token)] += bias;
    if (params.repetition_penalty != 1.0f) {
        std::vector<std::int32_t> seen = history;
        std::sort(seen.begin(), seen.end());
        seen.erase(std::unique(seen.begin(), seen.end()), seen.end());
        for (const std::int32_t token : seen) {
            float& logit = adjusted[at(token)];
            logit =
                logit > 0 ? logit / params.repetition_penalty : logit * params.repetition_penalty;
        }
    }
    if (params.presence_penalty != 0.0f || params.frequency_penalty != 0.0f) {
        std::unordered_map<std::int32_t, int> counts;
        for (std::size_t i = at(params.n_prompt_tokens); i < history.size(); ++i) {
            ++counts[history[i]];
        }
        for (const auto& [token, count] : counts) {
            adjusted[at(token)] -=
                params.presence_penalty + params.frequency_penalty * static_cast<float>(count);
        }
    }
    for (const std::int32_t token : params.banned) {
        adjusted[at(token)] = -std::numeric_limits<float>::infinity();
    }
    return adjusted;
}

// Keeps the most likely candidates that together have probability top_p of the whole.
void keep_top_p(std::vector<Candidate>& candidates, double total, float top_p) {
    // A candidate below this cannot be among them: even all n - 1 such leave more than top_p.
    const double cutoff =
        total * (1.0 - static_cast<double>(top_p)) / static_cast<double>(candidates.size());
    std::vector<Candidate> kept;
    for (const Candidate& candidate : candidates) {
        if (candidate.probability >= cutoff) kept.push_back(candidate);
    }
    std::sort(kept.begin(), kept.end(), likelier);
    double sum = 0;
    std::size_t n_kept = 0;
    while (n_kept < kept.size()) {
        sum += kept[n_kept++].probability;
        if (sum >= static_cast<double>(top_p) * total) break;
    }
    kept.resize(n_kept);
    candidates = std::move(kept);
}

double sum_probabilities(const std::vector<Candidate>& candidates) {
    return std::accumulate(candidates.begin(), candidates.end(), 0.0,
                           [](double sum, const Candidate& c) { return sum + c.probability; });
}

}  // namespace

void validate(const SamplingParams& params, std::int32_t vocab_size) {
    check_range("temperature", params.temperature, 0.0f, 1e6f);
    check_range("top_p", params.top_p, 0.0f, 1.0f);
    check_range("min_p", params.min_p, 0.0f, 1.0f);
    check_range("repetition_penalty", params.repetition_penalty, 1e-3f, 1e3f);
    check_range("presence_penalty", params.presence_penalty, -100.0f, 100.0f);
    check_range("frequency_penalty", params.frequency_penalty, -100.0f, 100.0f);
    if (params.top_k < 0) {
        throw Error(Status::invalid_argument,
                    "top_k is " + std::to_string(params.top_k) + "; it must not be negative");
    }
    if (params.n_prompt_tokens < 0) {
        throw Error(Status::invalid_argument, "n_prompt_tokens is " +
                                                  std::to_string(params.n_prompt_tokens) +
                                                  "; it must not be negative");
    }
    for (const auto& [token, bias] : params.logit_bias) {
        check_token("logit_bias", token, vocab_size);
        check_range("logit_bias", bias, -1e4f, 1e4f);
    }
    for (const std::int32_t token : params.banned)
        check_token("banned", token, vocab_size);
}

double RandomState::next_uniform() {
    std::uint64_t z = seed + (++n_draws) * 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    z ^= z >> 31;
    return static_cast<double>(z >> 11) * 0x1.0p-53;
}

std::int32_t sample(const std::vector<float>& logits, const std::vector<std::int32_t>& history,
                    const SamplingParams& params, RandomState& random, const StreamDecoder* text) {
    std::vector<float> adjusted = adjusted_logits(logits, history, params);
    if (text != nullptr) text->keep_whole(&adjusted);
    const auto best = std::max_element(adjusted.begin(), adjusted.end());
    if (best == adjusted.end() || !std::isfinite(*best)) {
        throw Error(Status::invalid_argument, "no token is left to draw: all of them are banned");
    }
    if (params.temperature == 0.0f || params.top_k == 1) {
        return static_cast<std::int32_t>(best - adjusted.begin());
    }
    std::vector<Candidate> candidates;
    candidates.reserve(adjusted.size());
    for (std::size_t i = 0; i < adjusted.size(); ++i) {
        // expf is zero below -104 and finite logits are: nothing that could be drawn is dropped.
        const float scaled = (adjusted[i] - *best) / params.temperature;
        if (scaled < -104.0f) continue;
        candidates.push_back(
            {static_cast<std::int32_t>(i), adjusted[i], static_cast<double>(std::exp(scaled))});
    }
    const auto k = static_cast<std::size_t>(params.top_k);
    if (k > 0 && k < candidates.size()) {
        std::nth_element(candidates.begin(), candidates.begin() + params.top_k, candidates.end(),
                         likelier);
        candidates.resize(k);
    }
    if (params.top_p < 1.0f) keep_top_p(candidates, sum_probabilities(candidates), params.top_p);
    if (params.min_p > 0.0f) {  // the likeliest has probability 1 before normalisation
        const double least = static_cast<double>(params.min_p);
        candidates.erase(
            std::remove_if(candidates.begin(), candidates.end(),
                           [least](const Candidate& c) { return c.probability < least; }),
            candidates.end());
    }
    double left = random.next_uniform() * sum_probabilities(candidates);
    for (const Candidate& candidate : candidates) {
        left -= candidate.probability;
        if (left < 0) return candidate.token;
    }
    return candidates.back().token;  // rounding used up the last of it
}

double log_probability(const float* logits, std::int32_t vocab_size, std::int32_t token) {
    const float most = *std::max_element(logits, logits + vocab_size);
    double sum = 0;
    for (std::int32_t i = 0; i < vocab_size; ++i) {
        sum += static_cast<double>(std::exp(logits[i] - most));
    }
    return static_cast<double>(logits[token]) - static_cast<double>(most) - std::log(sum);
}

std::vector<std::pair<std::int32_t, double>> top_log_probabilities(const std::vector<float>& logits,
                                                                   std::int32_t n) {
    const auto count = std::min(static_cast<std::size_t>(std::max(n, 0)), logits.size());
    std::vector<std::int32_t> order(logits.size());
    std::iota(order.begin(), order.end(), 0);
    std::partial_sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(count),
                      order.end(), [&](std::int32_t a, std::int32_t b) {
                          const float x = logits[static_cast<std::size_t>(a)];
                          const float y = logits[static_cast<std::size_t>(b)];
                          return x > y || (x == y && a < b);
                      });
    std::vector<std::pair<std::int32_t, double>> result;
    if (count == 0) return result;
    const auto vocab_size = static_cast<std::int32_t>(logits.size());
    const double best = log_probability(logits.data(), vocab_size, order[0]);
    for (std::size_t i = 0; i < count; ++i) {
        const double below = static_cast<double>(logits[static_cast<std::size_t>(order[i])]) -
                             static_cast<double>(logits[static_cast<std::size_t>(order[0])]);
        result.emplace_back(order[i], best + below);
    }
    return result;
}

}  // namespace tinyllama

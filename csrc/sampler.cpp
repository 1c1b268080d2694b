#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <unordered_map>

#include "kernels/kernel_table.h"
#include "status.h"
#include "tokenizer.h"

namespace tinyllama {
namespace {

// Everything that looks at all tokens goes through them in blocks of 64, as 16 lanes side by side
// with one fixed order of sums: plain loops that compilers turn into vectors of any width.
constexpr auto block_tokens = static_cast<std::size_t>(weigh_block);
constexpr std::size_t n_lanes = 16;
constexpr float impossible = -std::numeric_limits<float>::infinity();

// One value per token, filled up to whole blocks. Kept from one draw to the next.
struct Buffers {
    std::vector<float> logits;   // adjusted; the filling is minus infinity
    std::vector<float> weights;  // probabilities, not normalised: the likeliest has 1
    std::vector<float> maxima;   // of the logits of each block
    std::vector<float> sums;     // of the weights of each block
    std::vector<float> likelier_sums;
};

Buffers& this_threads_buffers() {
    thread_local Buffers buffers;
    return buffers;
}

template <std::size_t n = n_lanes, typename Fold>
float fold_lanes(float* lanes, Fold fold) {
    if constexpr (n == 1) {
        return lanes[0];
    } else {
        for (std::size_t k = 0; k < n / 2; ++k)
            lanes[k] = fold(lanes[k], lanes[k + n / 2]);
        return fold_lanes<n / 2>(lanes, fold);
    }
}

float larger(float a, float b) { return a > b ? a : b; }

float block_max(const float* x) {
    float lanes[n_lanes];
    std::copy(x, x + n_lanes, lanes);
    for (std::size_t i = n_lanes; i < block_tokens; i += n_lanes) {
        for (std::size_t k = 0; k < n_lanes; ++k)
            lanes[k] = larger(x[i + k], lanes[k]);
    }
    return fold_lanes(lanes, larger);
}

// The weights of a block for which keep(logit, weight) holds.
template <typename Keep>
float sum_where(const float* x, const float* weights, Keep keep) {
    float lanes[n_lanes] = {};
    for (std::size_t i = 0; i < block_tokens; i += n_lanes) {
        for (std::size_t k = 0; k < n_lanes; ++k)
            lanes[k] += keep(x[i + k], weights[i + k]) ? weights[i + k] : 0.0f;
    }
    return fold_lanes(lanes, std::plus<>());
}

float sum_all(const float* weights) {
    return sum_where(weights, weights, [](float, float) { return true; });
}

double total(const std::vector<float>& sums) {
    double sum = 0;
    for (const float block : sums)
        sum += static_cast<double>(block);
    return sum;
}

// Fills the logits up to whole blocks and finds the largest of each.
void find_maxima(Buffers& buffers) {
    std::vector<float>& logits = buffers.logits;
    const std::size_t n_blocks = (logits.size() + block_tokens - 1) / block_tokens;
    logits.resize(n_blocks * block_tokens, impossible);
    buffers.maxima.resize(n_blocks);
    for (std::size_t b = 0; b < n_blocks; ++b)
        buffers.maxima[b] = block_max(&logits[b * block_tokens]);
}

// A logit that at least k tokens reach: the k-th largest of the maxima of blocks, or of smaller
// pieces where there are not that many blocks.
float bound_of_likeliest(const Buffers& buffers, std::size_t k) {
    const std::vector<float>& logits = buffers.logits;
    if (k == 0 || k >= logits.size()) return impossible;
    std::size_t size = block_tokens;
    while (logits.size() / size < k)
        size /= 2;
    std::vector<float> maxima = buffers.maxima;
    if (size < block_tokens) {
        maxima.resize(logits.size() / size);
        for (std::size_t i = 0; i < maxima.size(); ++i)
            maxima[i] = *std::max_element(&logits[i * size], &logits[i * size] + size);
    }
    const auto kth = maxima.begin() + static_cast<std::ptrdiff_t>(k - 1);
    std::nth_element(maxima.begin(), kth, maxima.end(), std::greater<>());
    return *kth;
}

// The k likeliest tokens, fewer where fewer are possible, in order of their ids.
std::vector<std::int32_t> find_likeliest(const Buffers& buffers, std::size_t k) {
    const float bound = bound_of_likeliest(buffers, k);
    struct Candidate {
        std::int32_t token;
        float logit;
    };
    std::vector<Candidate> candidates;
    for (std::size_t b = 0; b < buffers.maxima.size(); ++b) {
        if (buffers.maxima[b] < bound) continue;
        for (std::size_t i = b * block_tokens; i < (b + 1) * block_tokens; ++i) {
            const float logit = buffers.logits[i];
            if (logit < bound || logit == impossible) continue;
            candidates.push_back({static_cast<std::int32_t>(i), logit});
        }
    }
    if (k < candidates.size()) {
        std::nth_element(candidates.begin(), candidates.begin() + static_cast<std::ptrdiff_t>(k),
                         candidates.end(), [](const Candidate& a, const Candidate& b) {
                             return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
                         });
        candidates.resize(k);
    }
    std::vector<std::int32_t> tokens;
    for (const Candidate& candidate : candidates)
        tokens.push_back(candidate.token);
    std::sort(tokens.begin(), tokens.end());
    return tokens;
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

void adjust(std::vector<float>& adjusted, const std::vector<std::int32_t>& history,
            const SamplingParams& params) {
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
        for (std::size_t i = at(params.n_prompt_tokens); i < history.size(); ++i)
            ++counts[history[i]];
        for (const auto& [token, count] : counts) {
            adjusted[at(token)] -=
                params.presence_penalty + params.frequency_penalty * static_cast<float>(count);
        }
    }
    for (const std::int32_t token : params.banned)
        adjusted[at(token)] = impossible;
}

// Weights e^((logit - best) / temperature) of all tokens, and their sums.
void weigh(const KernelTable& kernels, Buffers& buffers, float best, float temperature) {
    // log2(e) / temperature, bounded, as 0 times infinity would be no number.
    const float scale = std::min(1.44269504f / temperature, std::numeric_limits<float>::max());
    buffers.weights.resize(buffers.logits.size());
    buffers.sums.resize(buffers.maxima.size());
    kernels.weigh(buffers.weights.data(), buffers.sums.data(), buffers.logits.data(),
                  static_cast<std::int64_t>(buffers.sums.size()), best, scale);
}

void drop_below(Buffers& buffers, float least) {
    for (float& weight : buffers.weights)
        weight = weight >= least ? weight : 0.0f;
    for (std::size_t b = 0; b < buffers.sums.size(); ++b)
        buffers.sums[b] = sum_all(&buffers.weights[b * block_tokens]);
}

// Where `left`, in [0, total), falls when the weights are laid end to end.
std::size_t locate(const Buffers& buffers, double left) {
    std::size_t block = 0;
    for (std::size_t b = 0; b < buffers.sums.size(); ++b) {
        if (buffers.sums[b] == 0.0f) continue;
        block = b;
        if (left < static_cast<double>(buffers.sums[b])) break;
        left -= static_cast<double>(buffers.sums[b]);
    }
    std::size_t found = block * block_tokens;
    for (std::size_t i = found; i < (block + 1) * block_tokens; ++i) {
        if (buffers.weights[i] == 0.0f) continue;
        found = i;  // stays, where rounding leaves more than the block has
        if (left < static_cast<double>(buffers.weights[i])) break;
        left -= static_cast<double>(buffers.weights[i]);
    }
    return found;
}

// Sums the weights of what is likelier than token `i`: a larger logit, or the same and a lower id.
double sum_likelier(Buffers& buffers, std::size_t i) {
    const float logit = buffers.logits[i];
    const std::size_t own = i / block_tokens;
    buffers.likelier_sums.assign(buffers.sums.size(), 0.0f);
    for (std::size_t b = 0; b < buffers.sums.size(); ++b) {
        if (buffers.maxima[b] < logit) continue;
        const float* x = &buffers.logits[b * block_tokens];
        const float* weights = &buffers.weights[b * block_tokens];
        float& sum = buffers.likelier_sums[b];
        if (b < own) {
            sum = sum_where(x, weights, [logit](float other, float) { return other >= logit; });
        } else {
            sum = sum_where(x, weights, [logit](float other, float) { return other > logit; });
        }
        for (std::size_t k = 0; b == own && k < i % block_tokens; ++k)
            sum += x[k] == logit ? weights[k] : 0.0f;
    }
    return total(buffers.likelier_sums);
}

void keep_likelier(Buffers& buffers, std::size_t i) {
    const float logit = buffers.logits[i];
    for (std::size_t k = 0; k < i; ++k)
        buffers.weights[k] = buffers.logits[k] >= logit ? buffers.weights[k] : 0.0f;
    for (std::size_t k = i; k < buffers.weights.size(); ++k)
        buffers.weights[k] = buffers.logits[k] > logit ? buffers.weights[k] : 0.0f;
    buffers.sums.swap(buffers.likelier_sums);
}

// Draws from the nucleus, the smallest set of the likeliest whose weights reach `enough`, without
// ever finding it: a token is in it exactly when all that are likelier weigh less than that. One
// that is not is dropped with all below it, and the draw repeated among the rest, which is
// 1 + ln(1 / top_p) draws on average at most.
// `left` is the sum of all weights.
std::size_t draw_from_nucleus(Buffers& buffers, double left, double enough, RandomState& random) {
    while (true) {
        const std::size_t i = locate(buffers, random.next_uniform() * left);
        const double likelier = sum_likelier(buffers, i);
        if (likelier < enough) return i;
        keep_likelier(buffers, i);
        left = likelier;
    }
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

std::int32_t sample(const KernelTable& kernels, const std::vector<float>& logits,
                    const std::vector<std::int32_t>& history, const SamplingParams& params,
                    RandomState& random, const StreamDecoder* text) {
    Buffers& buffers = this_threads_buffers();
    buffers.logits = logits;
    adjust(buffers.logits, history, params);
    if (text != nullptr) text->keep_whole(&buffers.logits);
    find_maxima(buffers);
    const auto best = std::max_element(buffers.maxima.begin(), buffers.maxima.end());
    if (best == buffers.maxima.end() || !std::isfinite(*best)) {
        throw Error(Status::invalid_argument, "no token is left to draw: all of them are banned");
    }
    const float most = *best;
    if (params.temperature == 0.0f || params.top_k == 1 || params.top_p == 0.0f) {
        const auto block =
            (best - buffers.maxima.begin()) * static_cast<std::ptrdiff_t>(block_tokens);
        const auto begin = buffers.logits.begin();
        return static_cast<std::int32_t>(std::find(begin + block, buffers.logits.end(), most) -
                                         begin);
    }
    std::vector<std::int32_t> tokens;  // of the logits that are left, when not all are
    const auto k = static_cast<std::size_t>(params.top_k);
    if (k > 0 && k < logits.size()) {
        tokens = find_likeliest(buffers, k);
        for (std::size_t i = 0; i < tokens.size(); ++i)  // ids rise: none is overwritten too early
            buffers.logits[i] = buffers.logits[static_cast<std::size_t>(tokens[i])];
        buffers.logits.resize(tokens.size());
        find_maxima(buffers);
    }
    weigh(kernels, buffers, most, params.temperature);
    const double weight = total(buffers.sums);
    double left = weight;
    if (params.min_p > 0.0f) {
        drop_below(buffers, params.min_p);
        left = total(buffers.sums);
    }
    const std::size_t drawn =
        params.top_p < 1.0f
            ? draw_from_nucleus(buffers, left, static_cast<double>(params.top_p) * weight, random)
            : locate(buffers, random.next_uniform() * left);
    return tokens.empty() ? static_cast<std::int32_t>(drawn) : tokens[drawn];
}

double log_probability(const KernelTable& kernels, const float* logits, std::int32_t vocab_size,
                       std::int32_t token) {
    Buffers& buffers = this_threads_buffers();
    buffers.logits.assign(logits, logits + vocab_size);
    find_maxima(buffers);
    const float most = *std::max_element(buffers.maxima.begin(), buffers.maxima.end());
    weigh(kernels, buffers, most, 1.0f);
    return static_cast<double>(logits[token]) - static_cast<double>(most) -
           std::log(total(buffers.sums));
}

std::vector<std::pair<std::int32_t, double>> top_log_probabilities(const KernelTable& kernels,
                                                                   const std::vector<float>& logits,
                                                                   std::int32_t n) {
    Buffers& buffers = this_threads_buffers();
    buffers.logits = logits;
    find_maxima(buffers);
    std::vector<std::pair<std::int32_t, double>> result;
    const auto vocab_size = static_cast<std::int32_t>(logits.size());
    const auto count = static_cast<std::size_t>(std::max(n, 0));
    for (const std::int32_t token : find_likeliest(buffers, count))
        result.emplace_back(token, 0.0);
    if (result.empty()) return result;
    const auto logit = [&](std::int32_t token) { return logits[static_cast<std::size_t>(token)]; };
    std::stable_sort(result.begin(), result.end(),
                     [&](const auto& a, const auto& b) { return logit(a.first) > logit(b.first); });
    const std::int32_t first = result[0].first;
    const double best = log_probability(kernels, logits.data(), vocab_size, first);
    for (auto& [token, probability] : result) {
        probability =
            best + (static_cast<double>(logit(token)) - static_cast<double>(logit(first)));
    }
    return result;
}

}  // namespace tinyllama

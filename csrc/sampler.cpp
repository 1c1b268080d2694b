#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <iterator>
#include <numeric>
#include <string>

#include "softmax.h"
#include "status.h"
#include "tokenizer.h"

namespace tinyllama {
namespace {

constexpr std::size_t n_lanes = 16;  // side by side, with one fixed order of sums
constexpr std::size_t group = 16;    // blocks that are summed together

struct Candidate {
    std::int32_t token;
    float logit;
};

// Sums of the weights of each block, and of each group of them, so that nothing is searched for,
// nor added up, one block after the other.
struct Sums {
    std::vector<float> blocks;
    std::vector<double> groups;
    double all = 0;

    void add_up() {
        groups.assign((blocks.size() + group - 1) / group, 0.0);
        for (std::size_t b = 0; b < blocks.size(); ++b)
            groups[b / group] += static_cast<double>(blocks[b]);
        all = std::accumulate(groups.begin(), groups.end(), 0.0);
    }
};

// Kept from one draw to the next.
struct Buffers {
    // Probabilities, one per token and filled up to whole blocks, not normalised: the likeliest has
    // 1.
    AlignedVector<float> weights;
    Sums sums, likelier_sums;
    std::vector<std::pair<std::int32_t, float>> changed;
    std::vector<std::int32_t> breaking;
    std::vector<Candidate> candidates;
    std::vector<std::int32_t> allowed, likeliest, seen;
    Logits few, fewer;
    std::vector<float> maxima;
};

Buffers& this_threads_buffers() {
    thread_local Buffers buffers;
    return buffers;
}

// Logits changed for one draw, and put back when it is done.
class Adjusted {
public:
    Adjusted(Logits& logits, std::vector<std::pair<std::int32_t, float>>& changed)
        : logits_(logits), changed_(changed) {
        changed_.clear();
    }
    Adjusted(const Adjusted&) = delete;
    Adjusted& operator=(const Adjusted&) = delete;
    ~Adjusted() {
        for (auto change = changed_.rbegin(); change != changed_.rend(); ++change)
            logits_.values[static_cast<std::size_t>(change->first)] = change->second;
        find_maxima();
    }

    float operator[](std::int32_t token) const {
        return logits_.values[static_cast<std::size_t>(token)];
    }
    void set(std::int32_t token, float logit) {
        changed_.emplace_back(token, (*this)[token]);
        logits_.values[static_cast<std::size_t>(token)] = logit;
    }
    // Once all changes are made.
    void find_maxima() {
        std::size_t last = logits_.maxima.size();
        for (const auto& [token, logit] : changed_) {
            const std::size_t block = static_cast<std::size_t>(token) / logits_block;
            if (block != last) logits_.find_maximum(block);
            last = block;
        }
    }

private:
    Logits& logits_;
    std::vector<std::pair<std::int32_t, float>>& changed_;
};

template <std::size_t n = n_lanes>
float sum_of_lanes(float* lanes) {
    if constexpr (n == 1) {
        return lanes[0];
    } else {
        for (std::size_t k = 0; k < n / 2; ++k)
            lanes[k] += lanes[k + n / 2];
        return sum_of_lanes<n / 2>(lanes);
    }
}

// The weights of a block for which keep(logit, weight) holds.
template <typename Keep>
float sum_where(const float* x, const float* weights, Keep keep) {
    float lanes[n_lanes] = {};
    for (std::size_t i = 0; i < logits_block; i += n_lanes) {
        for (std::size_t k = 0; k < n_lanes; ++k)
            lanes[k] += keep(x[i + k], weights[i + k]) ? weights[i + k] : 0.0f;
    }
    return sum_of_lanes(lanes);
}

float sum_all(const float* weights) {
    return sum_where(weights, weights, [](float, float) { return true; });
}

// A logit that at least k tokens reach: the k-th largest of the maxima of blocks, or of smaller
// pieces where there are not that many blocks.
float bound_of_likeliest(const Logits& all, std::size_t k, std::vector<float>& maxima) {
    const AlignedVector<float>& logits = all.values;
    if (k == 0 || k >= logits.size()) return impossible;
    std::size_t size = logits_block;
    while (logits.size() / size < k)
        size /= 2;
    maxima.assign(all.maxima.begin(), all.maxima.end());
    if (size < logits_block) {
        maxima.resize(logits.size() / size);
        for (std::size_t i = 0; i < maxima.size(); ++i)
            maxima[i] = *std::max_element(&logits[i * size], &logits[i * size] + size);
    }
    const auto kth = maxima.begin() + static_cast<std::ptrdiff_t>(k - 1);
    std::nth_element(maxima.begin(), kth, maxima.end(), std::greater<>());
    return *kth;
}

// The k likeliest tokens, fewer where fewer are possible, in order of their ids.
const std::vector<std::int32_t>& find_likeliest(Buffers& buffers, const Logits& all,
                                                std::size_t k) {
    const float bound = bound_of_likeliest(all, k, buffers.maxima);
    std::vector<Candidate>& candidates = buffers.candidates;
    candidates.clear();
    for (std::size_t b = 0; b < all.maxima.size(); ++b) {
        if (all.maxima[b] < bound) continue;
        for (std::size_t i = b * logits_block; i < (b + 1) * logits_block; ++i) {
            const float logit = all.values[i];
            if (logit < bound || logit == impossible) continue;
            candidates.push_back({static_cast<std::int32_t>(i), logit});
        }
    }
    if (k < candidates.size()) {
        std::nth_element(candidates.begin(), candidates.begin() + static_cast<std::ptrdiff_t>(k),
                         candidates.end(), [](const Candidate& a, const Candidate& b) {
                             return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
                         });
        candidates.erase(candidates.begin() + static_cast<std::ptrdiff_t>(k), candidates.end());
    }
    std::vector<std::int32_t>& tokens = buffers.likeliest;
    tokens.clear();
    for (const Candidate& candidate : candidates)
        tokens.push_back(candidate.token);
    std::sort(tokens.begin(), tokens.end());
    return tokens;
}

void check_range(const char* name, float value, float least, float most) {
    if (!(value >= least && value <= most)) {  // NaN fails as well
        throw Error(Status::invalid_argument,
                    std::string(name) + " is " + number_text(static_cast<double>(value)) +
                        "; it must be in [" + number_text(static_cast<double>(least)) + ", " +
                        number_text(static_cast<double>(most)) + "]");
    }
}

void check_token(const char* name, std::int32_t token, std::int32_t vocab_size) {
    if (token < 0 || token >= vocab_size) {
        throw Error(Status::invalid_argument, std::string(name) + " has token " +
                                                  std::to_string(token) + ", outside the " +
                                                  std::to_string(vocab_size) + " tokens");
    }
}

bool adjusts(const SamplingParams& params) {
    return !params.logit_bias.empty() || !params.banned.empty() ||
           params.repetition_penalty != 1.0f || params.presence_penalty != 0.0f ||
           params.frequency_penalty != 0.0f;
}

void adjust(Adjusted& logits, const std::vector<std::int32_t>& history,
            const SamplingParams& params, std::vector<std::int32_t>& seen) {
    for (const auto& [token, bias] : params.logit_bias)
        logits.set(token, logits[token] + bias);
    if (params.repetition_penalty != 1.0f) {
        seen = history;
        std::sort(seen.begin(), seen.end());
        seen.erase(std::unique(seen.begin(), seen.end()), seen.end());
        const float penalty = params.repetition_penalty;
        for (const std::int32_t token : seen) {
            const float logit = logits[token];
            logits.set(token, logit > 0 ? logit / penalty : logit * penalty);
        }
    }
    if (params.presence_penalty != 0.0f || params.frequency_penalty != 0.0f) {
        const auto n_prompt =
            std::min(static_cast<std::size_t>(params.n_prompt_tokens), history.size());
        seen.assign(history.begin() + static_cast<std::ptrdiff_t>(n_prompt), history.end());
        std::sort(seen.begin(), seen.end());
        for (auto first = seen.begin(); first != seen.end();) {
            const auto last = std::upper_bound(first, seen.end(), *first);
            const float less = params.presence_penalty +
                               params.frequency_penalty * static_cast<float>(last - first);
            logits.set(*first, logits[*first] - less);
            first = last;
        }
    }
    for (const std::int32_t token : params.banned)
        logits.set(token, impossible);
}

// The likeliest token, the lowest id on ties, or -1 where none is possible.
std::int32_t find_largest(const Logits& logits) {
    const float best = logits.largest();
    if (best == impossible) return -1;
    const auto block = std::find(logits.maxima.begin(), logits.maxima.end(), best);
    const auto first = (block - logits.maxima.begin()) * static_cast<std::ptrdiff_t>(logits_block);
    const auto begin = logits.values.begin();
    return static_cast<std::int32_t>(std::find(begin + first, logits.values.end(), best) - begin);
}

// Weights e^((logit - best) / temperature) of all tokens, and their sums.
void weigh(const KernelTable& kernels, Buffers& buffers, const Logits& logits, float best,
           float temperature) {
    // log2(e) / temperature, bounded, as 0 times infinity would be no number.
    const float scale = std::min(1.44269504f / temperature, std::numeric_limits<float>::max());
    buffers.weights.resize(logits.values.size());
    std::vector<float>& blocks = buffers.sums.blocks;
    blocks.resize(logits.maxima.size());
    kernels.weigh(buffers.weights.data(), blocks.data(), logits.values.data(),
                  static_cast<std::int64_t>(blocks.size()), best, scale);
    buffers.sums.add_up();
}

void drop_below(Buffers& buffers, float least) {
    for (float& weight : buffers.weights)
        weight = weight >= least ? weight : 0.0f;
    for (std::size_t b = 0; b < buffers.sums.blocks.size(); ++b)
        buffers.sums.blocks[b] = sum_all(&buffers.weights[b * logits_block]);
    buffers.sums.add_up();
}

// In which of values[begin, end) `left` falls when they are laid end to end, and takes off what
// lies before. Where rounding leaves more than there is: the last that is not zero.
template <typename T>
std::size_t find_part(const T& values, std::size_t begin, std::size_t end, double* left) {
    std::size_t found = begin;
    for (std::size_t i = begin; i < std::min(end, values.size()); ++i) {
        const auto value = static_cast<double>(values[i]);
        if (value == 0.0) continue;
        found = i;
        if (*left < value) break;
        *left -= value;
    }
    return found;
}

// Where `left`, from zero to the sum of all, falls when the weights are laid end to end.
std::size_t locate(const Buffers& buffers, double left) {
    const Sums& sums = buffers.sums;
    const std::size_t g = find_part(sums.groups, 0, sums.groups.size(), &left);
    const std::size_t b = find_part(sums.blocks, g * group, (g + 1) * group, &left);
    return find_part(buffers.weights, b * logits_block, (b + 1) * logits_block, &left);
}

// Sums the weights of what is likelier than token `i`: a larger logit, or the same and a lower id.
void sum_likelier(Buffers& buffers, const Logits& logits, std::size_t i) {
    const float logit = logits.values[i];
    const std::size_t own = i / logits_block;
    std::vector<float>& blocks = buffers.likelier_sums.blocks;
    blocks.assign(buffers.sums.blocks.size(), 0.0f);
    for (std::size_t b = 0; b < blocks.size(); ++b) {
        if (logits.maxima[b] < logit) continue;
        const float* x = &logits.values[b * logits_block];
        const float* weights = &buffers.weights[b * logits_block];
        float& sum = blocks[b];
        if (b < own) {
            sum = sum_where(x, weights, [logit](float other, float) { return other >= logit; });
        } else {
            sum = sum_where(x, weights, [logit](float other, float) { return other > logit; });
        }
        for (std::size_t k = 0; b == own && k < i % logits_block; ++k)
            sum += x[k] == logit ? weights[k] : 0.0f;
    }
    buffers.likelier_sums.add_up();
}

void keep_likelier(Buffers& buffers, const Logits& logits, std::size_t i) {
    const float* const x = logits.values.data();
    const float logit = x[i];
    for (std::size_t b = 0; b < logits.maxima.size(); ++b) {
        if (logits.maxima[b] < logit) continue;  // its sum is zero now: nobody looks at its weights
        const std::size_t begin = b * logits_block, end = begin + logits_block;
        const std::size_t own = std::clamp(i, begin, end);
        for (std::size_t k = begin; k < own; ++k)
            buffers.weights[k] = x[k] >= logit ? buffers.weights[k] : 0.0f;
        for (std::size_t k = own; k < end; ++k)
            buffers.weights[k] = x[k] > logit ? buffers.weights[k] : 0.0f;
    }
    std::swap(buffers.sums, buffers.likelier_sums);
}

// Draws from the nucleus, the smallest set of the likeliest whose weights reach `enough`, without
// ever finding it: a token is in it exactly when all that are likelier weigh less than that. One
// that is not is dropped with all below it, and the draw repeated among the rest, which is
// 1 + ln(1 / top_p) draws on average at most.
std::size_t draw_from_nucleus(Buffers& buffers, const Logits& logits, double enough,
                              RandomState& random) {
    while (true) {
        const std::size_t i = locate(buffers, random.next_uniform() * buffers.sums.all);
        sum_likelier(buffers, logits, i);
        if (buffers.likelier_sums.all < enough) return i;
        keep_likelier(buffers, logits, i);
    }
}

// By temperature, min_p and top_p; `best` is the largest logit.
std::size_t draw(const KernelTable& kernels, Buffers& buffers, const Logits& logits, float best,
                 const SamplingParams& params, RandomState& random) {
    weigh(kernels, buffers, logits, best, params.temperature);
    const double enough = static_cast<double>(params.top_p) * buffers.sums.all;
    if (params.min_p > 0.0f) drop_below(buffers, params.min_p);
    if (params.top_p == 1.0f) return locate(buffers, random.next_uniform() * buffers.sums.all);
    return draw_from_nucleus(buffers, logits, enough, random);
}

void pick(const Logits& logits, const std::vector<std::int32_t>& tokens, Logits* few) {
    few->values.clear();
    few->resize(tokens.size());
    for (std::size_t i = 0; i < tokens.size(); ++i)
        few->values[i] = logits.values[static_cast<std::size_t>(tokens[i])];
    few->find_maxima();
}

// By all the rules that come after adjusting.
std::int32_t draw_or_choose(const KernelTable& kernels, Buffers& buffers, const Logits& logits,
                            const SamplingParams& params, RandomState& random) {
    const std::int32_t likeliest = find_largest(logits);
    const float best =
        likeliest < 0 ? impossible : logits.values[static_cast<std::size_t>(likeliest)];
    if (!std::isfinite(best))
        throw Error(Status::invalid_argument,
                    "no token is left to draw: all of them are banned, or not allowed here");
    if (params.temperature == 0.0f || params.top_k == 1 || params.top_p == 0.0f) return likeliest;
    const auto k = static_cast<std::size_t>(params.top_k);
    if (k == 0 || k >= logits.values.size())
        return static_cast<std::int32_t>(draw(kernels, buffers, logits, best, params, random));
    const std::vector<std::int32_t>& tokens = find_likeliest(buffers, logits, k);
    pick(logits, tokens, &buffers.fewer);
    return tokens[draw(kernels, buffers, buffers.fewer, best, params, random)];
}

// Of some tokens only: those that keep characters whole, if there are such.
std::int32_t draw_allowed(const KernelTable& kernels, Buffers& buffers, const Logits& logits,
                          const SamplingParams& params, RandomState& random,
                          const StreamDecoder* text, const std::vector<std::int32_t>& allowed) {
    const auto is_possible = [&](std::int32_t token) {
        return logits.values[static_cast<std::size_t>(token)] != impossible;
    };
    const auto is_whole = [&](std::int32_t token) {
        return text == nullptr || text->keeps_whole(token);
    };
    std::vector<std::int32_t>& tokens = buffers.allowed;
    tokens.clear();
    std::copy_if(allowed.begin(), allowed.end(), std::back_inserter(tokens), is_possible);
    if (std::any_of(tokens.begin(), tokens.end(), is_whole))
        tokens.erase(std::remove_if(tokens.begin(), tokens.end(), std::not_fn(is_whole)),
                     tokens.end());
    pick(logits, tokens, &buffers.few);
    const std::int32_t drawn = draw_or_choose(kernels, buffers, buffers.few, params, random);
    return tokens[static_cast<std::size_t>(drawn)];
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

std::int32_t sample(const KernelTable& kernels, Logits& logits,
                    const std::vector<std::int32_t>& history, const SamplingParams& params,
                    RandomState& random, const StreamDecoder* text,
                    const std::vector<std::int32_t>* allowed) {
    if (allowed != nullptr && allowed->size() == 1) return allowed->front();
    const bool greedy = params.temperature == 0.0f || params.top_k == 1 || params.top_p == 0.0f;
    if (greedy && allowed == nullptr && !adjusts(params)) {
        const std::int32_t token = find_largest(logits);
        if (token >= 0 && (text == nullptr || text->keeps_whole(token))) return token;
    }
    Buffers& buffers = this_threads_buffers();
    Adjusted adjusted(logits, buffers.changed);
    adjust(adjusted, history, params, buffers.seen);
    if (allowed != nullptr)
        return draw_allowed(kernels, buffers, logits, params, random, text, *allowed);
    if (text != nullptr) {
        text->find_breaking(logits.values.data(), &buffers.breaking);
        for (const std::int32_t token : buffers.breaking)
            adjusted.set(token, impossible);
    }
    adjusted.find_maxima();
    return draw_or_choose(kernels, buffers, logits, params, random);
}

std::size_t sample_one_of(const KernelTable& kernels, const std::vector<double>& scores,
                          const SamplingParams& params, RandomState& random) {
    Buffers& buffers = this_threads_buffers();
    Logits& few = buffers.few;
    few.values.clear();
    few.resize(scores.size());
    const double best = *std::max_element(scores.begin(), scores.end());
    for (std::size_t i = 0; i < scores.size(); ++i)
        few.values[i] = std::isfinite(best) ? static_cast<float>(scores[i] - best) : impossible;
    few.find_maxima();
    return static_cast<std::size_t>(draw_or_choose(kernels, buffers, few, params, random));
}

std::vector<std::pair<std::int32_t, double>> top_log_probabilities(const KernelTable& kernels,
                                                                   const Logits& logits,
                                                                   std::int32_t n) {
    std::vector<std::pair<std::int32_t, double>> result;
    if (n <= 0) return result;
    for (const std::int32_t token :
         find_likeliest(this_threads_buffers(), logits, static_cast<std::size_t>(n)))
        result.emplace_back(token, 0.0);
    const auto logit = [&](std::int32_t token) {
        return logits.values[static_cast<std::size_t>(token)];
    };
    std::stable_sort(result.begin(), result.end(),
                     [&](const auto& a, const auto& b) { return logit(a.first) > logit(b.first); });
    const std::int32_t first = result[0].first;
    const double best = log_probabilities(kernels, logits, {first})[0];
    for (auto& [token, probability] : result) {
        probability =
            best + (static_cast<double>(logit(token)) - static_cast<double>(logit(first)));
    }
    return result;
}

}  // namespace tinyllama

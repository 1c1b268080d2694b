// The scores of all tokens, in blocks of 64.
#pragma once

#include <algorithm>
#include <cstddef>
#include <limits>

#include "aligned_vector.h"
#include "kernels/kernel_table.h"

namespace tinyllama {

constexpr auto logits_block = static_cast<std::size_t>(weigh_block);
constexpr float impossible = -std::numeric_limits<float>::infinity();

inline float larger(float a, float b) { return a > b ? a : b; }

// As 16 lanes side by side: plain loops that compilers turn into vectors of any width.
inline float largest_of_block(const float* x) {
    constexpr std::size_t n_lanes = 16;
    float lanes[n_lanes];
    for (std::size_t k = 0; k < n_lanes; ++k)
        lanes[k] = x[k];
    for (std::size_t i = n_lanes; i < logits_block; i += n_lanes) {
        for (std::size_t k = 0; k < n_lanes; ++k)
            lanes[k] = larger(x[i + k], lanes[k]);
    }
    for (std::size_t half = n_lanes / 2; half > 0; half /= 2) {
        for (std::size_t k = 0; k < half; ++k)
            lanes[k] = larger(lanes[k], lanes[k + half]);
    }
    return lanes[0];
}

// `values` is filled up to whole blocks with minus infinity; `maxima` has the largest of each.
struct Logits {
    AlignedVector<float> values;
    AlignedVector<float> maxima;

    void resize(std::size_t n_tokens) {
        maxima.resize((n_tokens + logits_block - 1) / logits_block);
        values.resize(n_tokens);
        values.resize(maxima.size() * logits_block, impossible);
    }

    void find_maximum(std::size_t block) {
        maxima[block] = largest_of_block(&values[block * logits_block]);
    }

    float largest() const {
        constexpr std::size_t n_lanes = 16;
        float lanes[n_lanes];
        std::fill_n(lanes, n_lanes, impossible);
        std::size_t i = 0;
        for (; i + n_lanes <= maxima.size(); i += n_lanes) {
            for (std::size_t k = 0; k < n_lanes; ++k)
                lanes[k] = larger(maxima[i + k], lanes[k]);
        }
        for (; i < maxima.size(); ++i)
            lanes[0] = larger(maxima[i], lanes[0]);
        return *std::max_element(lanes, lanes + n_lanes);
    }

    void find_maxima() {
        for (std::size_t block = 0; block < maxima.size(); ++block)
            find_maximum(block);
    }
};

}  // namespace tinyllama

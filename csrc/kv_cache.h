// Keys and values of one timeline, per layer, growing with it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace tinyllama {

class KvCache {
public:
    KvCache(std::int32_t n_layers, std::int32_t kv_dim)
        : kv_dim_(kv_dim), keys_(static_cast<std::size_t>(n_layers)), values_(keys_.size()) {}

    // Room for positions [0, n_positions); what is there stays. Grows by half at least, so that a
    // long timeline is copied a bounded number of times.
    void reserve(std::int32_t n_positions, std::int32_t max_seq_len) {
        if (n_positions <= capacity_) return;
        const std::int32_t grown = std::max({n_positions, capacity_ + capacity_ / 2, 32});
        const std::int32_t wanted = std::min(grown, max_seq_len);
        for (std::size_t i = 0; i < keys_.size(); ++i) {
            keys_[i].resize(static_cast<std::size_t>(wanted) * static_cast<std::size_t>(kv_dim_));
            values_[i].resize(keys_[i].size());
        }
        capacity_ = wanted;
    }

    // Position 0 of a layer; position p starts at p * kv_dim, its head h at h * head_dim.
    float* keys(std::int32_t layer) { return keys_[static_cast<std::size_t>(layer)].data(); }
    float* values(std::int32_t layer) { return values_[static_cast<std::size_t>(layer)].data(); }

private:
    std::int32_t kv_dim_;
    std::int32_t capacity_ = 0;
    std::vector<std::vector<float>> keys_;    // per layer (capacity, kv_dim)
    std::vector<std::vector<float>> values_;  // per layer (capacity, kv_dim)
};

}  // namespace tinyllama

// The hyperparameters of a Llama as read from a GGUF file.
#pragma once

#include <cstdint>
#include <vector>

namespace tinyllama {

class GgufFile;

struct Config {
    std::int32_t dim = 0;
    std::int32_t hidden_dim = 0;    // as stored
    std::int32_t hidden_units = 0;  // without the units of zeros that pad it to whole blocks
    std::int32_t n_layers = 0;
    std::int32_t n_heads = 0;
    std::int32_t n_kv_heads = 0;
    std::int32_t head_dim = 0;
    std::int32_t vocab_size = 0;
    std::int32_t max_seq_len = 0;
    float rope_theta = 10000.0f;
    // What each rotary frequency is divided by, (head_dim / 2): all ones without scaling.
    std::vector<float> rope_factors;
    float norm_eps = 1e-5f;
    bool tie_embeddings = true;

    std::int32_t q_dim() const { return n_heads * head_dim; }
    std::int32_t kv_dim() const { return n_kv_heads * head_dim; }
};

// Reads and validates every hyperparameter. Throws Error(format_error) naming the key where one is
// missing or of the wrong type, Error(config_error) naming the value where one is out of range.
Config read_config(const GgufFile& file);

// Every range and divisibility rule, each with its own message.
void validate(const Config& config);

}  // namespace tinyllama

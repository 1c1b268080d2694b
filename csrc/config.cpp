#include "config.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "byte_reader.h"
#include "gguf.h"
#include "status.h"

namespace tinyllama {

namespace {

// Far above any Llama, low enough that no product of two of them overflows an int64.
constexpr std::int32_t max_width = 1 << 20;  // dim, head_dim, n_heads
constexpr std::int32_t max_hidden_dim = 1 << 24;
constexpr std::int32_t max_layers = 1 << 14;
constexpr std::int32_t max_vocab_size = 1 << 24;
constexpr std::int32_t max_seq_len = 1 << 30;

[[noreturn]] void refuse(const std::string& message) { throw Error(Status::config_error, message); }

void check_range(const char* name, std::int64_t value, std::int64_t most) {
    if (value < 1 || value > most) {
        refuse(std::string(name) + " is " + std::to_string(value) + "; it must be in [1, " +
               std::to_string(most) + "]");
    }
}

void check_positive(const std::string& name, double value) {
    if (!(std::isfinite(value) && value > 0.0)) {
        refuse(name + " is " + number_text(value) + "; it must be positive and finite");
    }
}

std::int32_t read_int32(const GgufFile& file, const char* key) {
    const std::int64_t value = file.get_int(key);
    if (value < std::numeric_limits<std::int32_t>::min() ||
        value > std::numeric_limits<std::int32_t>::max()) {
        refuse(std::string(key) + " is " + std::to_string(value) + ", out of range");
    }
    return static_cast<std::int32_t>(value);
}

// Absent: as many as heads. An array holds one number per layer; ours must all be the same.
std::int32_t read_n_kv_heads(const GgufFile& file, const Config& config) {
    const char* key = "llama.attention.head_count_kv";
    if (!file.has(key)) return config.n_heads;
    if (!std::holds_alternative<GgufInts>(file.metadata().find(key)->second)) {
        return read_int32(file, key);
    }
    const std::vector<std::int64_t>& values = file.get_ints(key);
    if (values.size() != static_cast<std::size_t>(config.n_layers)) {
        refuse(std::string(key) + " has " + std::to_string(values.size()) +
               " items, but llama.block_count is " + std::to_string(config.n_layers));
    }
    for (const std::int64_t value : values) {
        if (value != values[0]) {
            refuse(std::string(key) + " differs between layers (" + std::to_string(values[0]) +
                   " and " + std::to_string(value) + "); it must be the same in all");
        }
    }
    check_range(key, values[0], max_width);
    return static_cast<std::int32_t>(values[0]);
}

std::int32_t read_head_dim(const GgufFile& file, const Config& config) {
    const char* key = "llama.attention.key_length";
    std::int32_t head_dim = 0;
    if (file.has(key)) {
        head_dim = read_int32(file, key);
    } else if (config.dim % config.n_heads == 0) {
        head_dim = config.dim / config.n_heads;
    } else {
        refuse("llama.embedding_length (" + std::to_string(config.dim) +
               ") is not divisible by llama.attention.head_count (" +
               std::to_string(config.n_heads) + "), so " + key + " must be given");
    }
    for (const char* other : {"llama.attention.value_length", "llama.rope.dimension_count"}) {
        if (file.has(other) && file.get_int(other) != head_dim) {
            refuse(std::string(other) + " is " + std::to_string(file.get_int(other)) +
                   "; it must be the head dimension " + std::to_string(head_dim));
        }
    }
    return head_dim;
}

std::int32_t read_vocab_size(const GgufFile& file) {
    const GgufTensor* embeddings = file.find_tensor("token_embd.weight");
    if (embeddings == nullptr) {
        throw Error(Status::format_error, file.name() + ": tensor 'token_embd.weight' is missing");
    }
    const std::uint64_t rows = embeddings->rows;
    if (rows > static_cast<std::uint64_t>(max_vocab_size)) {
        refuse("tensor 'token_embd.weight' has " + std::to_string(rows) + " rows; at most " +
               std::to_string(max_vocab_size) + " are allowed");
    }
    const char* key = "llama.vocab_size";
    if (file.has(key) && file.get_int(key) != static_cast<std::int64_t>(rows)) {
        refuse(std::string(key) + " is " + std::to_string(file.get_int(key)) +
               ", but tensor 'token_embd.weight' has " + std::to_string(rows) + " rows");
    }
    return static_cast<std::int32_t>(rows);
}

// The factor all frequencies are divided by: "linear" scaling, or its older spelling.
double read_linear_scaling(const GgufFile& file) {
    const char* type_key = "llama.rope.scaling.type";
    if (file.has(type_key)) {
        const std::string& type = file.get_string(type_key);
        if (type == "none") return 1.0;
        if (type != "linear") {
            refuse(std::string(type_key) + " is " + quoted(type) +
                   "; known are 'none' and 'linear'");
        }
    }
    for (const char* key : {"llama.rope.scaling.factor", "llama.rope.scale_linear"}) {
        if (!file.has(key)) continue;
        const double factor = file.get_float(key);
        if (!(std::isfinite(factor) && factor >= 1.0)) {
            refuse(std::string(key) + " is " + std::to_string(factor) + "; it must be at least 1");
        }
        return factor;
    }
    if (file.has(type_key)) file.get_float("llama.rope.scaling.factor");  // throws: it is missing
    return 1.0;
}

// Llama 3's scaling comes as a tensor: one factor for each frequency.
std::vector<float> read_rope_factors(const GgufFile& file, const Config& config) {
    const double linear = read_linear_scaling(file);
    const auto n_pairs = static_cast<std::size_t>(config.head_dim / 2);
    std::vector<float> factors(n_pairs, static_cast<float>(linear));
    const GgufTensor* tensor = file.find_tensor("rope_freqs.weight");
    if (tensor == nullptr) return factors;
    if (tensor->dtype != DType::f32 || tensor->rows != 1 || tensor->cols != n_pairs) {
        refuse("tensor 'rope_freqs.weight' is " + std::string(dtype_name(tensor->dtype)) + " " +
               std::to_string(tensor->rows) + " x " + std::to_string(tensor->cols) +
               "; it must be f32 1 x " + std::to_string(n_pairs) + ", half the head dimension");
    }
    for (std::size_t i = 0; i < n_pairs; ++i) {
        float factor = 0.0f;
        std::memcpy(&factor, tensor->bytes.data + i * sizeof(float), sizeof(float));
        check_positive("item " + std::to_string(i) + " of tensor 'rope_freqs.weight'",
                       static_cast<double>(factor));
        factors[i] = static_cast<float>(linear * static_cast<double>(factor));
    }
    return factors;
}

Config read_fields(const GgufFile& file) {
    const std::string& architecture = file.get_string("general.architecture");
    if (architecture != "llama") {
        refuse("general.architecture is " + quoted(architecture) + "; only 'llama' is known");
    }
    const char* experts = "llama.expert_count";
    if (file.has(experts) && file.get_int(experts) != 0) {
        refuse("llama.expert_count is " + std::to_string(file.get_int(experts)) +
               "; mixtures of experts are not known");
    }
    Config config;
    config.dim = read_int32(file, "llama.embedding_length");
    config.hidden_dim = read_int32(file, "llama.feed_forward_length");
    const char* unpadded = "tinyllama.hidden_dim";
    config.hidden_units = file.has(unpadded) ? read_int32(file, unpadded) : config.hidden_dim;
    config.n_layers = read_int32(file, "llama.block_count");
    config.n_heads = read_int32(file, "llama.attention.head_count");
    config.max_seq_len = read_int32(file, "llama.context_length");
    check_range("llama.embedding_length", config.dim, max_width);
    check_range("llama.block_count", config.n_layers, max_layers);
    check_range("llama.attention.head_count", config.n_heads, max_width);
    config.n_kv_heads = read_n_kv_heads(file, config);
    config.head_dim = read_head_dim(file, config);
    check_range("llama.attention.key_length", config.head_dim, max_width);
    config.vocab_size = read_vocab_size(file);
    config.norm_eps = static_cast<float>(file.get_float("llama.attention.layer_norm_rms_epsilon"));
    if (file.has("llama.rope.freq_base")) {
        config.rope_theta = static_cast<float>(file.get_float("llama.rope.freq_base"));
    }
    config.rope_factors = read_rope_factors(file, config);
    config.tie_embeddings = file.find_tensor("output.weight") == nullptr;
    return config;
}

}  // namespace

Config read_config(const GgufFile& file) {
    try {
        Config config = read_fields(file);
        validate(config);
        return config;
    } catch (const Error& error) {
        if (error.code() != Status::config_error) throw;
        throw Error(Status::config_error, file.name() + ": " + error.what());
    }
}

void validate(const Config& config) {
    check_range("dim", config.dim, max_width);
    check_range("hidden_dim", config.hidden_dim, max_hidden_dim);
    check_range("tinyllama.hidden_dim", config.hidden_units, config.hidden_dim);
    check_range("n_layers", config.n_layers, max_layers);
    check_range("n_heads", config.n_heads, max_width);
    check_range("n_kv_heads", config.n_kv_heads, max_width);
    check_range("head_dim", config.head_dim, max_width);
    check_range("vocab_size", config.vocab_size, max_vocab_size);
    check_range("max_seq_len", config.max_seq_len, max_seq_len);
    if (config.n_heads % config.n_kv_heads != 0) {
        refuse("n_heads (" + std::to_string(config.n_heads) + ") is not divisible by n_kv_heads (" +
               std::to_string(config.n_kv_heads) + ")");
    }
    if (config.head_dim % 2 != 0) {
        refuse("head_dim is " + std::to_string(config.head_dim) +
               "; rotary embedding needs an even one");
    }
    // q_dim() and kv_dim() are int32.
    const std::int64_t q_dim = std::int64_t{config.n_heads} * config.head_dim;
    check_range("n_heads * head_dim", q_dim, max_hidden_dim);
    check_positive("rope_theta", static_cast<double>(config.rope_theta));
    check_positive("norm_eps", static_cast<double>(config.norm_eps));
    if (config.rope_factors.size() != static_cast<std::size_t>(config.head_dim / 2)) {
        refuse("rope_factors has " + std::to_string(config.rope_factors.size()) +
               " items; head_dim / 2 is " + std::to_string(config.head_dim / 2));
    }
    for (const float factor : config.rope_factors) {
        check_positive("a rope factor", static_cast<double>(factor));
    }
}

}  // namespace tinyllama

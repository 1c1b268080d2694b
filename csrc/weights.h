// The weights of a Llama: tensors of a GGUF file, checked against the Config.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "config.h"
#include "gguf.h"

namespace tinyllama {

struct Matrix {                // row-major (rows, cols): y = W x has `rows` elements
    DType dtype = DType::f32;  // f32, bf16 or q8_0
    std::int64_t rows = 0;
    std::int64_t cols = 0;
    const void* data = nullptr;
};

struct LayerWeights {
    const float* attn_norm;  // (dim)
    Matrix wq;               // (n_heads * head_dim, dim)
    Matrix wk, wv;           // (n_kv_heads * head_dim, dim)
    Matrix wo;               // (dim, n_heads * head_dim)
    const float* ffn_norm;   // (dim)
    Matrix w_gate, w_up;     // (hidden_dim, dim)
    Matrix w_down;           // (dim, hidden_dim)
};

class Weights {
public:
    // Points into the file's bytes, which must stay alive; what the kernels cannot read in place
    // (f16, misaligned data) is copied. Throws Error(format_error) when a tensor is missing, of
    // the wrong shape or not known, Error(nonfinite) when a weight is NaN or infinite.
    Weights(const GgufFile& file, const Config& config, int n_threads);

    Matrix tok_embed;  // (vocab_size, dim)
    std::vector<LayerWeights> layers;
    const float* final_norm = nullptr;  // (dim)
    Matrix lm_head;                     // (vocab_size, dim); tok_embed where tied

    std::uint64_t n_bytes = 0;       // of all weights in memory, a tied matrix once
    std::uint64_t n_parameters = 0;  // without padding

private:
    friend class WeightReader;
    std::vector<std::unique_ptr<std::uint8_t[]>> owned_;
};

// Row `row` of a matrix as floats: out has cols elements.
void dequantize_row(const Matrix& matrix, std::int64_t row, float* out);

}  // namespace tinyllama

// The weights of a Llama: tensors of a GGUF file, checked against the Config.
#pragma once

#include <cstdint>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "config.h"
#include "gguf.h"
#include "kernels/kernel_table.h"
#include "parallel.h"

namespace tinyllama {

// Memory for packed weights, 64-byte aligned, on large pages where it is large and the system can.
class AlignedBytes {
public:
    explicit AlignedBytes(std::size_t size);
    AlignedBytes(const AlignedBytes&) = delete;
    AlignedBytes& operator=(const AlignedBytes&) = delete;
    ~AlignedBytes();
    std::uint8_t* data() const { return data_; }

private:
    std::size_t size_, alignment_;
    std::uint8_t* data_;
};

struct Matrix {                // y = W x has `rows` elements
    DType dtype = DType::f32;  // f32, bf16, q8_0 or q4_0
    std::int64_t rows = 0;
    std::int64_t cols = 0;
    Panels panels{};
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
    // Copies everything out of the file, packed for the kernels; f16 becomes f32. Throws
    // Error(format_error) when a tensor is missing, of the wrong shape or not known,
    // Error(nonfinite) when a weight is NaN or infinite.
    Weights(const GgufFile& file, const Config& config, const KernelTable& kernels,
            Threads& threads);

    Matrix tok_embed;  // (vocab_size, dim)
    std::vector<LayerWeights> layers;
    const float* final_norm = nullptr;  // (dim)
    Matrix lm_head;                     // (vocab_size, dim); tok_embed where tied

    std::uint64_t n_bytes = 0;       // of all weights as kept, a tied matrix once
    std::uint64_t n_parameters = 0;  // without padding

private:
    friend class WeightReader;
    std::unique_ptr<AlignedBytes> owned_;
};

}  // namespace tinyllama

// The Llama forward pass over a batch of rows: each row is one token of one timeline.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "kernels/kernel_table.h"
#include "kv_cache.h"
#include "model.h"

namespace tinyllama {

// One token at one position of one timeline. Rows of a timeline follow each other by position, and
// its cache has room for them and holds all earlier positions.
struct Row {
    KvCache* cache;
    std::int32_t pos;
    std::int32_t token;
    float* logits;  // (vocab_size) out, or null where nobody asks
};

// Buffers of a forward pass over n rows. Sizes are in elements.
struct Workspace {
    std::vector<float> x;          // (n, dim) residual stream
    std::vector<float> normed;     // (n, dim)
    std::vector<float> q;          // (n, n_heads * head_dim)
    std::vector<float> k, v;       // (n, n_kv_heads * head_dim)
    std::vector<float> heads;      // (n, n_heads * head_dim) attention output of every head
    std::vector<float> out;        // (n, dim) what is added to the residual stream
    std::vector<float> gate, up;   // (n, hidden_dim)
    std::vector<float> scores;     // (n_threads, longest timeline)
    std::vector<float> logits;     // (rows that ask for logits, vocab_size)
    std::vector<float> cos, sin;   // (n, head_dim / 2)
    std::vector<ActQ8> quantized;  // activations for q8_0 weights
};

// Shown each named stage: values is (n_rows, width), row-major, valid during the call only.
using Tap = std::function<void(const std::string& stage, const float* values, std::int64_t n_rows,
                               std::int64_t width)>;

// Computes every row, adds its keys and values to its cache, and writes the logits asked for.
// An element of the result depends on its own timeline alone, bit for bit: not on the other rows,
// nor on how a timeline is cut into calls, nor on threads.
void forward(const Model& model, const std::vector<Row>& rows, Workspace& workspace,
             const Tap* tap = nullptr);

}  // namespace tinyllama

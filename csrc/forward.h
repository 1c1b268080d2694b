// The Llama forward pass over a batch of rows: each row is one token of one timeline.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

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

// What a matrix product reads, in the form that its weights ask for. `width` is that of a row.
struct Activations {
    std::vector<float> values;        // (n, width)
    std::vector<std::uint16_t> bf16;  // (n, width rounded up to 32)
    std::vector<std::int8_t> q8;      // (n, width rounded up to 64), with
    std::vector<float> scales;        // (n, width / 32) and
    std::vector<std::int32_t> sums;   // (n, width / 32)
};

// Buffers of a forward pass over n rows. Sizes are in elements.
struct Workspace {
    std::vector<float> x;             // (n, dim) residual stream
    std::vector<Activations> normed;  // of width dim: one, or for a single row one per thread
    std::vector<float> q;             // (n, n_heads * head_dim)
    std::vector<float> k, v;          // (n, n_kv_heads * head_dim)
    std::vector<Activations> heads;   // of width n_heads * head_dim: the output of every head
    std::vector<float> up;            // (n, hidden_dim)
    Activations hidden;               // of width hidden_dim
    std::vector<float> logits;        // (n_threads, rows that ask for logits, a few panels)
    std::vector<float> cos, sin;      // (n, head_dim / 2)
};

// Shown each named stage: values is (n_rows, width), row-major, valid during the call only.
using Tap = std::function<void(const std::string& stage, const float* values, std::int64_t n_rows,
                               std::int64_t width)>;

// Computes every row, adds its keys and values to its cache, and writes the logits asked for.
// An element of the result depends on its own timeline alone, bit for bit: not on the other rows,
// nor on how a timeline is cut into calls, nor on threads. With a tap it runs on one thread.
void forward(const Model& model, const std::vector<Row>& rows, Workspace& workspace,
             const Tap* tap = nullptr);

}  // namespace tinyllama

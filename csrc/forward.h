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
    float* logits;            // (vocab_size) out, or null where nobody asks
    float* maxima = nullptr;  // (blocks of 64 of them) out, the largest of each, or null
};

// What matrix products read in place of floats, in the form that their weights ask for. `width` is
// that of a row.
struct Forms {
    std::vector<std::uint16_t> bf16;  // (n, width rounded up to 32)
    std::vector<std::int8_t> q8;      // (n, width rounded up to 64), with
    std::vector<float> scales;        // (n, groups of 512 in width) and
    std::vector<std::int32_t> sums;   // (n, width / 32)
};

// Buffers of a forward pass over n rows. Sizes are in elements.
struct Workspace {
    std::vector<float> x;                    // (n, dim) residual stream
    std::vector<std::vector<float>> normed;  // (n, dim): one, or for a single row one per thread
    std::vector<float> q;                    // (n, n_heads * head_dim)
    std::vector<float> k, v;                 // (n, n_kv_heads * head_dim)
    std::vector<float> heads;                // (n, n_heads * head_dim): the output of every head
    std::vector<float> hidden, up;           // (n, hidden_dim)
    std::vector<Forms> forms;                // of what is multiplied now: one, or one per thread
    std::vector<float> logits;               // (n_threads, rows that ask for logits, a few panels)
    std::vector<float> cos, sin;             // (n, head_dim / 2)
};

// Shown each named stage: values is (n_rows, width), row-major, valid during the call only.
using Tap = std::function<void(const std::string& stage, const float* values, std::int64_t n_rows,
                               std::int64_t width)>;

// Computes every row, adds its keys and values to its cache, and writes the logits asked for.
// An element of the result depends on its own timeline alone, bit for bit: not on the other rows,
// nor on how a timeline is cut into calls, nor on threads. With a tap it runs on one thread.
// Returns whether every logit is a finite number.
bool forward(const Model& model, const std::vector<Row>& rows, Workspace& workspace,
             const Tap* tap = nullptr);

}  // namespace tinyllama

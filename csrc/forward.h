// The Llama forward pass over a batch of rows: each row is one token of one timeline.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <string>
#include <vector>

#include "aligned_vector.h"
#include "costs.h"
#include "kv_cache.h"
#include "model.h"
#include "parallel.h"
#include "softmax.h"

namespace tinyllama {

// One token at one position of one timeline. Rows of a timeline follow each other by position, and
// its cache has room for them and holds all earlier positions.
struct Row {
    KvCache* cache;
    std::int32_t pos;
    std::int32_t token;
    float* logits;               // (vocab_size) out, or null where nobody asks
    float* maxima = nullptr;     // (blocks of 64 of them) out, the largest of each, or null
    Excerpt* excerpt = nullptr;  // out, or null

    bool is_wanted() const { return logits != nullptr || excerpt != nullptr; }
};

// What matrix products read in place of floats, in the form that their weights ask for. `width` is
// that of a row.
struct Forms {
    AlignedVector<std::uint16_t> bf16;  // (n, width rounded up to 32)
    AlignedVector<std::int8_t> q8;      // (n, width rounded up to 64), with
    AlignedVector<float> scales;        // (n, groups in width) and
    AlignedVector<std::int32_t> sums;   // (n, width / 32)
    AlignedVector<std::int8_t> q24;     // (n, 3, width rounded up to 64), with
    AlignedVector<float> q24_scales;    // (n, groups in width)
};

// How matrices of f32 are multiplied: by matmul_f32, as every timeline promises to be, or by
// matmul_q24 where the processor has it, which suits those that nobody goes on with.
enum class F32Products { in_order, q24 };

// Shown each named stage: values is (n_rows, width), row-major, valid during the call only.
using Tap = std::function<void(const std::string& stage, const float* values, std::int64_t n_rows,
                               std::int64_t width)>;

// A forward pass over a batch. It may stop after any piece of its work, and go on later.
class Pass {
public:
    explicit Pass(const Model& model);

    // Takes up a batch, of at least one row, in place of the one before. Memory is kept between
    // batches. With a tap it runs on one thread.
    void begin(const std::vector<Row>& rows, const Tap* tap = nullptr,
               F32Products f32 = F32Products::in_order);

    // Pieces still to do: halves of layers, then parts of the output head; amounts are
    // multiplications.
    std::int64_t n_left() const { return n_pieces_ - n_done_; }
    Work next(std::int64_t i) const;  // in [0, n_left())

    // One of the pieces of any batch of n rows, which look at so many positions all together and
    // all ask for logits; and how many of them there are.
    Work piece(Work::Kind kind, std::int64_t n, std::int64_t n_positions) const;
    std::int64_t n_pieces(Work::Kind kind) const;

    // Does the next n pieces, or all that are left. With the last one every row has been computed,
    // its keys and values are in its cache, and the logits asked for are written. An element of the
    // result depends on its own timeline alone, bit for bit: not on the other rows, nor on how a
    // timeline is cut into passes or a pass into pieces, nor on threads.
    void advance(std::int64_t n);

    // From now on nothing of that timeline is read or written.
    void drop(const KvCache& cache);

    // All of it at once; returns whether every logit is a finite number.
    bool run(const std::vector<Row>& rows, const Tap* tap = nullptr,
             F32Products f32 = F32Products::in_order);

    // Whether every logit written is a finite number.
    bool all_finite() const { return all_finite_.load(std::memory_order_relaxed); }

private:
    struct Asked;
    struct Input;
    struct Product;

    void embed(const Team& team);
    void attention(const Team& team, std::int32_t layer, const LayerWeights& w, std::int64_t n);
    void attend(std::int32_t layer, const Range& timeline, std::int64_t kv_head, bool only_wanted);
    void feed_forward(const Team& team, std::int32_t layer, const LayerWeights& w, std::int64_t n);
    void output(const Team& team, std::int64_t first, std::int64_t last);
    std::int32_t hand_out(const Row& row, std::int64_t begin, float* logits, std::int64_t n);

    Input norm(const Team& team, const float* weight, const Asked& asked, std::int64_t n,
               bool of_wanted = false);
    Input converted(const Team& team, const AlignedVector<float>& rows, std::int64_t width,
                    const Asked& asked, std::int64_t n);
    void convert(Forms* forms, std::int64_t row, const float* values, std::int64_t width,
                 const Asked& asked);
    void matmuls(const Team& team, const Input& h, std::initializer_list<Product> products);
    void add_product(const Team& team, const Matrix& w, const AlignedVector<float>& rows,
                     std::int64_t width, std::int64_t n);
    void matmul(const Matrix& w, const Input& h, const Output& y, std::int64_t n,
                const Range& panels);
    void show(const char* stage, const AlignedVector<float>& values, std::int64_t width,
              std::int32_t layer = -1) const;

    void do_pieces(const Team& team, std::int64_t end);
    int n_threads() const;
    void allocate();
    Asked asked_by_model() const;
    std::int64_t n_wanted() const { return static_cast<std::int64_t>(wanted_.size()); }
    std::int64_t n_after(std::int64_t layer) const;
    std::int64_t n_blocks() const;  // of 64 logits
    const Row& at(std::int64_t row) const { return rows_[static_cast<std::size_t>(row)]; }
    float* x(std::int64_t row) { return x_.data() + row * c_.dim; }
    float* query(std::int64_t row, std::int64_t head);

    const Model& model_;
    const Config& c_;
    const KernelTable& k_;
    std::int64_t n_output_pieces_;
    std::int64_t n_pieces_;
    std::int64_t n_done_;

    std::vector<Row> rows_;
    const Tap* tap_ = nullptr;
    bool f32_as_q24_ = false;
    std::int64_t n_ = 0;                // rows
    std::int64_t n_positions_ = 0;      // that the rows look at, all together
    std::vector<std::int64_t> wanted_;  // rows whose logits are asked for
    std::vector<std::int64_t> places_;  // of every row, if it is wanted: where in wanted_
    std::vector<Range> timelines_;      // rows of one timeline each
    std::atomic<bool> all_finite_{true};

    AlignedVector<float> x_;                    // (n, dim) residual stream
    std::vector<AlignedVector<float>> normed_;  // (n, dim): one, or for a single row one per thread
    AlignedVector<float> q_;                    // (n, n_heads * head_dim)
    AlignedVector<float> keys_, values_;        // (n, n_kv_heads * head_dim)
    AlignedVector<float> heads_;                // (n, n_heads * head_dim): the output of every head
    AlignedVector<float> hidden_, up_;          // (n, hidden_dim)
    std::vector<Forms> forms_;                  // of what is multiplied now: one, or one per thread
    AlignedVector<float> logits_;               // (n_threads, rows asking for logits, a few panels)
    AlignedVector<float> cos_, sin_;            // (n, head_dim), as rope() reads them
};

}  // namespace tinyllama

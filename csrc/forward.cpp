// The page to read first: a Llama, from tokens to logits.
//
//   x = tok_embed[token]
//   for every layer:
//     h = rms_norm(x);  q, k, v = Wq h, Wk h, Wv h;  q, k are rotated by their position
//     x += Wo attention(q, all keys so far, all values so far)
//     h = rms_norm(x);  x += Wdown (silu(Wgate h) * (Wup h))
//   logits = Whead rms_norm(x)

#include "forward.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "parallel.h"

namespace tinyllama {
namespace {

// Below this many multiply-adds a second thread costs more than it saves.
constexpr std::int64_t min_work_per_thread = 1 << 17;

class Pass {
public:
    Pass(const Model& model, const std::vector<Row>& rows, Workspace& workspace, const Tap* tap)
        : model_(model),
          c_(model.config()),
          k_(model.kernels()),
          rows_(rows),
          ws_(workspace),
          tap_(tap),
          n_(static_cast<std::int64_t>(rows.size())) {}

    void run() {
        allocate();
        embed();
        compute_rope_tables();
        for (std::int32_t layer = 0; layer < c_.n_layers; ++layer) {
            if (tap_ != nullptr) prefix_ = "layers." + std::to_string(layer) + ".";
            const LayerWeights& w = model_.weights().layers[static_cast<std::size_t>(layer)];
            attention(layer, w);
            feed_forward(w);
        }
        output();
    }

private:
    void attention(std::int32_t layer, const LayerWeights& w) {
        norm(w.attn_norm);
        show("attn_norm", ws_.normed, c_.dim);
        quantize_for(w.wq, ws_.normed);
        matmul(w.wq, ws_.normed, ws_.q);
        quantize_for(w.wk, ws_.normed, &w.wq);
        matmul(w.wk, ws_.normed, ws_.k);
        quantize_for(w.wv, ws_.normed, &w.wk);
        matmul(w.wv, ws_.normed, ws_.v);
        rotate_and_store(layer);
        show("q", ws_.q, c_.q_dim());
        show("k", ws_.k, c_.kv_dim());
        show("v", ws_.v, c_.kv_dim());
        attend(layer);
        show("attn", ws_.heads, c_.q_dim());
        quantize_for(w.wo, ws_.heads);
        matmul(w.wo, ws_.heads, ws_.out);
        add_to_residual();
        show("attn_out", ws_.x, c_.dim);
    }

    void feed_forward(const LayerWeights& w) {
        norm(w.ffn_norm);
        show("ffn_norm", ws_.normed, c_.dim);
        quantize_for(w.w_gate, ws_.normed);
        matmul(w.w_gate, ws_.normed, ws_.gate);
        quantize_for(w.w_up, ws_.normed, &w.w_gate);
        matmul(w.w_up, ws_.normed, ws_.up);
        for_rows(c_.hidden_dim, [&](std::int64_t row) {
            float* gate = ws_.gate.data() + row * c_.hidden_dim;
            k_.swiglu(gate, gate, ws_.up.data() + row * c_.hidden_dim, c_.hidden_dim);
        });
        show("ffn_hidden", ws_.gate, c_.hidden_dim);
        quantize_for(w.w_down, ws_.gate);
        matmul(w.w_down, ws_.gate, ws_.out);
        add_to_residual();
        show("ffn_out", ws_.x, c_.dim);
    }

    // Only rows whose logits somebody asked for take part.
    void output() {
        std::int64_t n_wanted = 0;
        for (std::int64_t row = 0; row < n_; ++row) {
            if (rows_[static_cast<std::size_t>(row)].logits == nullptr) continue;
            if (row != n_wanted) {
                std::memcpy(ws_.x.data() + n_wanted * c_.dim, ws_.x.data() + row * c_.dim,
                            static_cast<std::size_t>(c_.dim) * sizeof(float));
            }
            ++n_wanted;
        }
        if (n_wanted == 0) return;
        n_ = n_wanted;
        prefix_.clear();
        norm(model_.weights().final_norm);
        show("final_norm", ws_.normed, c_.dim);
        ws_.logits.resize(static_cast<std::size_t>(n_) * static_cast<std::size_t>(c_.vocab_size));
        quantize_for(model_.weights().lm_head, ws_.normed);
        matmul(model_.weights().lm_head, ws_.normed, ws_.logits);
        show("logits", ws_.logits, c_.vocab_size);
        const float* logits = ws_.logits.data();
        for (const Row& row : rows_) {
            if (row.logits == nullptr) continue;
            std::memcpy(row.logits, logits,
                        static_cast<std::size_t>(c_.vocab_size) * sizeof(float));
            logits += c_.vocab_size;
        }
    }

    void embed() {
        for (std::int64_t row = 0; row < n_; ++row) {
            dequantize_row(model_.weights().tok_embed, rows_[static_cast<std::size_t>(row)].token,
                           ws_.x.data() + row * c_.dim);
        }
        prefix_.clear();
        show("tok_embed", ws_.x, c_.dim);
    }

    // The angle of pair i at position p is p * rope_theta^(-2i / head_dim) / rope_factors[i]
    // (Su et al., arXiv 2104.09864), in double because p can be large.
    void compute_rope_tables() {
        const std::int64_t n_pairs = c_.head_dim / 2;
        for (std::int64_t i = 0; i < n_pairs; ++i) {
            const double exponent = -2.0 * static_cast<double>(i) / c_.head_dim;
            const double frequency =
                std::pow(static_cast<double>(c_.rope_theta), exponent) /
                static_cast<double>(c_.rope_factors[static_cast<std::size_t>(i)]);
            for (std::int64_t row = 0; row < n_; ++row) {
                const double angle = rows_[static_cast<std::size_t>(row)].pos * frequency;
                const auto at = static_cast<std::size_t>(row * n_pairs + i);
                ws_.cos[at] = static_cast<float>(std::cos(angle));
                ws_.sin[at] = static_cast<float>(std::sin(angle));
            }
        }
    }

    void norm(const float* weight) {
        for_rows(c_.dim, [&](std::int64_t row) {
            k_.rms_norm(ws_.normed.data() + row * c_.dim, ws_.x.data() + row * c_.dim, weight,
                        c_.dim, c_.norm_eps);
        });
    }

    void rotate_and_store(std::int32_t layer) {
        const std::int64_t n_pairs = c_.head_dim / 2;
        for_rows(c_.q_dim(), [&](std::int64_t r) {
            const Row& row = rows_[static_cast<std::size_t>(r)];
            const float* cos = ws_.cos.data() + r * n_pairs;
            const float* sin = ws_.sin.data() + r * n_pairs;
            float* k = ws_.k.data() + r * c_.kv_dim();
            k_.rope(ws_.q.data() + r * c_.q_dim(), cos, sin, c_.n_heads, c_.head_dim);
            k_.rope(k, cos, sin, c_.n_kv_heads, c_.head_dim);
            const std::int64_t at = static_cast<std::int64_t>(row.pos) * c_.kv_dim();
            const std::size_t n_bytes = static_cast<std::size_t>(c_.kv_dim()) * sizeof(float);
            std::memcpy(row.cache->keys(layer) + at, k, n_bytes);
            std::memcpy(row.cache->values(layer) + at, ws_.v.data() + r * c_.kv_dim(), n_bytes);
        });
    }

    // Every head of every row looks back over its own timeline; n_heads / n_kv_heads query heads
    // share a key head (Ainslie et al., arXiv 2305.13245).
    void attend(std::int32_t layer) {
        const std::int64_t group = c_.n_heads / c_.n_kv_heads;
        const auto scores_stride = static_cast<std::int64_t>(longest_);
        const std::int64_t work = n_ * scores_stride * c_.q_dim() * 2;
        parallel_for(threads_for(work), n_ * c_.n_heads,
                     [&](std::int64_t begin, std::int64_t end, int thread) {
                         float* scores = ws_.scores.data() + thread * scores_stride;
                         for (std::int64_t i = begin; i < end; ++i) {
                             const Row& row = rows_[static_cast<std::size_t>(i / c_.n_heads)];
                             const std::int64_t kv_head = (i % c_.n_heads) / group;
                             k_.attend(ws_.heads.data() + i * c_.head_dim,
                                       ws_.q.data() + i * c_.head_dim,
                                       row.cache->keys(layer) + kv_head * c_.head_dim,
                                       row.cache->values(layer) + kv_head * c_.head_dim,
                                       c_.kv_dim(), row.pos + 1, c_.head_dim, scores);
                         }
                     });
    }

    void add_to_residual() {
        for_rows(c_.dim, [&](std::int64_t row) {
            k_.add(ws_.x.data() + row * c_.dim, ws_.out.data() + row * c_.dim, c_.dim);
        });
    }

    // q8_0 weights meet int8 activations; matrices of one input share them (`before` was served).
    void quantize_for(const Matrix& w, const std::vector<float>& input,
                      const Matrix* before = nullptr) {
        if (w.dtype != DType::q8_0 || (before != nullptr && before->dtype == DType::q8_0)) return;
        const std::int64_t blocks = w.cols / 32;
        ws_.quantized.resize(static_cast<std::size_t>(n_ * blocks));
        for_rows(w.cols, [&](std::int64_t row) {
            k_.quantize_q8(ws_.quantized.data() + row * blocks, input.data() + row * w.cols,
                           w.cols);
        });
    }

    // y (n, rows) = input (n, cols) times the transpose of w (rows, cols).
    void matmul(const Matrix& w, const std::vector<float>& input, std::vector<float>& y) {
        const float* x = input.data();
        parallel_for(
            threads_for(n_ * w.rows * w.cols), w.rows,
            [&](std::int64_t begin, std::int64_t end, int) {
                if (w.dtype == DType::f32) {
                    k_.matmul_f32(y.data(), w.rows, static_cast<const float*>(w.data), w.cols, x,
                                  w.cols, n_, begin, end);
                } else if (w.dtype == DType::bf16) {
                    k_.matmul_bf16(y.data(), w.rows, static_cast<const std::uint16_t*>(w.data),
                                   w.cols, x, w.cols, n_, begin, end);
                } else {
                    k_.matmul_q8_0(y.data(), w.rows, static_cast<const BlockQ8_0*>(w.data), w.cols,
                                   ws_.quantized.data(), w.cols / 32, n_, begin, end);
                }
            });
    }

    template <typename Body>
    void for_rows(std::int64_t width, const Body& body) {
        parallel_for(threads_for(n_ * width), n_, [&](std::int64_t begin, std::int64_t end, int) {
            for (std::int64_t row = begin; row < end; ++row)
                body(row);
        });
    }

    int threads_for(std::int64_t work) const {
        return static_cast<int>(
            std::clamp<std::int64_t>(work / min_work_per_thread, 1, model_.n_threads()));
    }

    void show(const char* stage, const std::vector<float>& values, std::int64_t width) const {
        if (tap_ != nullptr) (*tap_)(prefix_ + stage, values.data(), n_, width);
    }

    void allocate() {
        for (const Row& row : rows_)
            longest_ = std::max(longest_, row.pos + 1);
        const auto fit = [this](std::vector<float>& buffer, std::int64_t width) {
            buffer.resize(static_cast<std::size_t>(n_ * width));
        };
        for (auto* buffer : {&ws_.x, &ws_.normed, &ws_.out})
            fit(*buffer, c_.dim);
        for (auto* buffer : {&ws_.q, &ws_.heads})
            fit(*buffer, c_.q_dim());
        for (auto* buffer : {&ws_.k, &ws_.v})
            fit(*buffer, c_.kv_dim());
        for (auto* buffer : {&ws_.gate, &ws_.up})
            fit(*buffer, c_.hidden_dim);
        for (auto* buffer : {&ws_.cos, &ws_.sin})
            fit(*buffer, c_.head_dim / 2);
        ws_.scores.resize(static_cast<std::size_t>(longest_) *
                          static_cast<std::size_t>(model_.n_threads()));
    }

    const Model& model_;
    const Config& c_;
    const KernelTable& k_;
    const std::vector<Row>& rows_;
    Workspace& ws_;
    const Tap* tap_;
    std::int64_t n_;  // rows still taking part
    std::int32_t longest_ = 0;
    std::string prefix_;
};

}  // namespace

void forward(const Model& model, const std::vector<Row>& rows, Workspace& workspace,
             const Tap* tap) {
    if (rows.empty()) return;
    Pass(model, rows, workspace, tap).run();
}

}  // namespace tinyllama

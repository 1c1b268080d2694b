#include "weights.h"

#include <atomic>
#include <cmath>
#include <cstring>
#include <set>

#include "kernels/kernel_table.h"
#include "parallel.h"

namespace tinyllama {
namespace {

float float_from_bits(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

float float_from_f16(std::uint16_t half) {
    const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
    const std::uint32_t exponent = (half >> 10) & 0x1Fu;
    const std::uint32_t mantissa = half & 0x3FFu;
    if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24
        const float magnitude = std::ldexp(static_cast<float>(mantissa), -24);
        return sign ? -magnitude : magnitude;
    }
    if (exponent == 31) return float_from_bits(sign | 0x7F800000u | (mantissa << 13));
    return float_from_bits(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

std::uint16_t load_u16(const std::uint8_t* bytes) {
    std::uint16_t value;
    std::memcpy(&value, bytes, sizeof(value));
    return value;
}

// Index of the first value (q8_0: block) in [begin, end) that is NaN or infinite, or -1.
std::int64_t find_nonfinite(const GgufTensor& tensor, std::int64_t begin, std::int64_t end) {
    const std::uint8_t* bytes = tensor.bytes.data;
    for (std::int64_t i = begin; i < end; ++i) {
        bool bad = false;
        if (tensor.dtype == DType::f32) {
            std::uint32_t bits;
            std::memcpy(&bits, bytes + 4 * i, sizeof(bits));
            bad = (bits & 0x7F800000u) == 0x7F800000u;
        } else if (tensor.dtype == DType::bf16) {
            bad = (load_u16(bytes + 2 * i) & 0x7F80u) == 0x7F80u;
        } else if (tensor.dtype == DType::f16) {
            bad = (load_u16(bytes + 2 * i) & 0x7C00u) == 0x7C00u;
        } else {
            bad = (load_u16(bytes + sizeof(BlockQ8_0) * static_cast<std::size_t>(i)) & 0x7C00u) ==
                  0x7C00u;
        }
        if (bad) return i;
    }
    return -1;
}

std::string shape_text(const GgufTensor& tensor) {
    return tensor.n_dims == 1
               ? "(" + std::to_string(tensor.cols) + ")"
               : "(" + std::to_string(tensor.rows) + ", " + std::to_string(tensor.cols) + ")";
}

}  // namespace

// Takes tensors out of the file one by one; what nobody asked for is an error at the end.
class WeightReader {
public:
    WeightReader(const GgufFile& file, int n_threads, Weights* weights)
        : file_(file), n_threads_(n_threads), weights_(weights) {}

    Matrix matrix(const std::string& name, std::int64_t rows, std::int64_t cols) {
        const GgufTensor& tensor = take(name, 2, rows, cols);
        Matrix result{tensor.dtype, rows, cols, tensor.bytes.data};
        const std::size_t alignment = tensor.dtype == DType::f32 ? 4 : 2;
        if (tensor.dtype == DType::f16) {
            result.dtype = DType::f32;
            result.data = as_floats(tensor);
        } else if (reinterpret_cast<std::uintptr_t>(tensor.bytes.data) % alignment != 0) {
            std::uint8_t* copy = allocate(tensor.bytes.size);
            std::memcpy(copy, tensor.bytes.data, tensor.bytes.size);
            result.data = copy;
        }
        return result;
    }

    const float* vector(const std::string& name, std::int64_t size) {
        const GgufTensor& tensor = take(name, 1, 1, size);
        if (tensor.dtype == DType::q8_0) {
            throw Error(Status::format_error,
                        file_.name() + ": tensor " + name + " is q8_0; a vector must be f32");
        }
        return as_floats(tensor);
    }

    void finish() const {
        for (const GgufTensor& tensor : file_.tensors()) {
            if (taken_.count(tensor.name) == 0 && tensor.name != "rope_freqs.weight") {
                throw Error(Status::format_error, file_.name() + ": unknown tensor " + tensor.name);
            }
        }
    }

private:
    const GgufTensor& take(const std::string& name, int n_dims, std::int64_t rows,
                           std::int64_t cols) {
        const GgufTensor* tensor = file_.find_tensor(name);
        if (tensor == nullptr) {
            throw Error(Status::format_error, file_.name() + ": tensor " + name + " is missing");
        }
        if (tensor->rows != static_cast<std::uint64_t>(rows) ||
            tensor->cols != static_cast<std::uint64_t>(cols)) {
            GgufTensor expected;
            expected.n_dims = n_dims;
            expected.rows = static_cast<std::uint64_t>(rows);
            expected.cols = static_cast<std::uint64_t>(cols);
            throw Error(Status::format_error, file_.name() + ": tensor " + name + " has shape " +
                                                  shape_text(*tensor) + ", expected " +
                                                  shape_text(expected));
        }
        check_finite(*tensor);
        taken_.insert(name);
        const std::uint64_t n_values = tensor->rows * tensor->cols;
        weights_->n_bytes += tensor->dtype == DType::f16 ? 4 * n_values : tensor->bytes.size;
        weights_->n_parameters += n_values;
        return *tensor;
    }

    void check_finite(const GgufTensor& tensor) const {
        const std::int64_t block = tensor.dtype == DType::q8_0 ? 32 : 1;
        const auto n = static_cast<std::int64_t>(tensor.rows * tensor.cols) / block;
        std::atomic<std::int64_t> first{-1};
        // A thread for less than a few hundred thousand values costs more than it saves.
        const int threads = n < (1 << 18) ? 1 : n_threads_;
        parallel_for(threads, n, [&](std::int64_t begin, std::int64_t end, int) {
            const std::int64_t found = find_nonfinite(tensor, begin, end);
            if (found >= 0) first.store(found);
        });
        if (first.load() >= 0) {
            throw Error(Status::nonfinite, file_.name() + ": tensor " + tensor.name +
                                               " holds NaN or infinity at element " +
                                               std::to_string(first.load() * block));
        }
    }

    const float* as_floats(const GgufTensor& tensor) {
        const std::uint8_t* bytes = tensor.bytes.data;
        if (tensor.dtype == DType::f32 && reinterpret_cast<std::uintptr_t>(bytes) % 4 == 0) {
            return reinterpret_cast<const float*>(bytes);
        }
        const auto n = static_cast<std::int64_t>(tensor.rows * tensor.cols);
        auto* out = reinterpret_cast<float*>(allocate(static_cast<std::size_t>(n) * 4));
        parallel_for(
            n < (1 << 18) ? 1 : n_threads_, n, [&](std::int64_t begin, std::int64_t end, int) {
                for (std::int64_t i = begin; i < end; ++i) {
                    if (tensor.dtype == DType::f32) {
                        std::memcpy(out + i, bytes + 4 * i, 4);
                    } else if (tensor.dtype == DType::bf16) {
                        out[i] = float_from_bits(static_cast<std::uint32_t>(load_u16(bytes + 2 * i))
                                                 << 16);
                    } else {
                        out[i] = float_from_f16(load_u16(bytes + 2 * i));
                    }
                }
            });
        return out;
    }

    std::uint8_t* allocate(std::size_t n_bytes) {
        weights_->owned_.push_back(std::make_unique<std::uint8_t[]>(n_bytes));
        return weights_->owned_.back().get();
    }

    const GgufFile& file_;
    int n_threads_;
    Weights* weights_;
    std::set<std::string> taken_;
};

Weights::Weights(const GgufFile& file, const Config& config, int n_threads) {
    WeightReader reader(file, n_threads, this);
    tok_embed = reader.matrix("token_embd.weight", config.vocab_size, config.dim);
    for (std::int32_t i = 0; i < config.n_layers; ++i) {
        const std::string layer = "blk." + std::to_string(i) + ".";
        LayerWeights w{};
        w.attn_norm = reader.vector(layer + "attn_norm.weight", config.dim);
        w.wq = reader.matrix(layer + "attn_q.weight", config.q_dim(), config.dim);
        w.wk = reader.matrix(layer + "attn_k.weight", config.kv_dim(), config.dim);
        w.wv = reader.matrix(layer + "attn_v.weight", config.kv_dim(), config.dim);
        w.wo = reader.matrix(layer + "attn_output.weight", config.dim, config.q_dim());
        w.ffn_norm = reader.vector(layer + "ffn_norm.weight", config.dim);
        w.w_gate = reader.matrix(layer + "ffn_gate.weight", config.hidden_dim, config.dim);
        w.w_up = reader.matrix(layer + "ffn_up.weight", config.hidden_dim, config.dim);
        w.w_down = reader.matrix(layer + "ffn_down.weight", config.dim, config.hidden_dim);
        layers.push_back(w);
    }
    final_norm = reader.vector("output_norm.weight", config.dim);
    const std::int64_t padding = config.hidden_dim - config.hidden_units;
    n_parameters -= static_cast<std::uint64_t>(3 * padding * config.dim * config.n_layers);
    lm_head = config.tie_embeddings ? tok_embed
                                    : reader.matrix("output.weight", config.vocab_size, config.dim);
    reader.finish();
}

void dequantize_row(const Matrix& matrix, std::int64_t row, float* out) {
    const std::int64_t cols = matrix.cols;
    if (matrix.dtype == DType::f32) {
        std::memcpy(out, static_cast<const float*>(matrix.data) + row * cols,
                    static_cast<std::size_t>(cols) * sizeof(float));
    } else if (matrix.dtype == DType::bf16) {
        const auto* values = static_cast<const std::uint16_t*>(matrix.data) + row * cols;
        for (std::int64_t i = 0; i < cols; ++i) {
            out[i] = float_from_bits(static_cast<std::uint32_t>(values[i]) << 16);
        }
    } else {
        const auto* blocks = static_cast<const BlockQ8_0*>(matrix.data) + row * (cols / 32);
        for (std::int64_t i = 0; i < cols; ++i) {
            const BlockQ8_0& block = blocks[i / 32];
            out[i] = float_from_f16(block.scale) * static_cast<float>(block.q[i % 32]);
        }
    }
}

}  // namespace tinyllama

#include "weights.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <set>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "memory.h"
#include "packing.h"

namespace tinyllama {
namespace {

constexpr std::size_t large_page = std::size_t{1} << 21;

float float_from_bits(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

bool is_block_format(DType dtype) { return dtype == DType::q8_0 || dtype == DType::q4_0; }

std::uint16_t load_u16(const std::uint8_t* bytes) {
    std::uint16_t value;
    std::memcpy(&value, bytes, sizeof(value));
    return value;
}

// Index of the first value (q8_0, q4_0: block) in [begin, end) that is NaN or infinite, or -1.
std::int64_t find_nonfinite(const GgufTensor& tensor, std::int64_t begin, std::int64_t end) {
    const std::uint8_t* bytes = tensor.bytes.data;
    // What decides is a float's exponent, all ones: that of the value, or of the block's scale.
    if (tensor.dtype == DType::f32) {
        for (std::int64_t i = begin; i < end; ++i) {
            std::uint32_t bits;
            std::memcpy(&bits, bytes + 4 * i, sizeof(bits));
            if ((bits & 0x7F800000u) == 0x7F800000u) return i;
        }
        return -1;
    }
    const std::uint32_t ones = tensor.dtype == DType::bf16 ? 0x7F80u : 0x7C00u;
    const auto stride = static_cast<std::int64_t>(
        is_block_format(tensor.dtype) ? row_bytes(tensor.dtype, block_size) : 2);
    for (std::int64_t i = begin; i < end; ++i) {
        if ((load_u16(bytes + stride * i) & ones) == ones) return i;
    }
    return -1;
}

// Values [begin, begin + n) of an f32, bf16 or f16 tensor.
void to_floats(const GgufTensor& tensor, std::int64_t begin, std::int64_t n, float* out) {
    const std::int64_t size = tensor.dtype == DType::f32 ? 4 : 2;
    const std::uint8_t* bytes = tensor.bytes.data + begin * size;
    for (std::int64_t i = 0; i < n; ++i) {
        if (tensor.dtype == DType::f32) {
            std::memcpy(out + i, bytes + 4 * i, 4);
        } else if (tensor.dtype == DType::bf16) {
            out[i] = float_from_bits(static_cast<std::uint32_t>(load_u16(bytes + 2 * i)) << 16);
        } else {
            out[i] = float_from_f16(load_u16(bytes + 2 * i));
        }
    }
}

std::string shape_text(const GgufTensor& tensor) {
    return tensor.n_dims == 1
               ? "(" + std::to_string(tensor.cols) + ")"
               : "(" + std::to_string(tensor.rows) + ", " + std::to_string(tensor.cols) + ")";
}

}  // namespace

// The first value that is not finite, found by many threads.
class FirstBad {
public:
    void look(const GgufTensor& tensor, std::int64_t begin, std::int64_t n_values) {
        const std::int64_t block = is_block_format(tensor.dtype) ? block_size : 1;
        const std::int64_t found =
            find_nonfinite(tensor, begin / block, (begin + n_values) / block);
        if (found >= 0) first_.store(found * block);
    }
    void refuse(const GgufFile& file, const GgufTensor& tensor) const {
        if (first_.load() < 0) return;
        throw Error(Status::nonfinite, file.name() + ": tensor " + tensor.name +
                                           " holds NaN or infinity at element " +
                                           std::to_string(first_.load()));
    }

private:
    std::atomic<std::int64_t> first_{-1};
};

// Takes tensors out of the file one by one; what nobody asked for is an error at the end.
class WeightReader {
public:
    WeightReader(const GgufFile& file, const KernelTable& kernels, Threads& threads,
                 Weights* weights)
        : file_(file), kernels_(kernels), threads_(threads), weights_(weights) {
        std::size_t total = panels_slack;
        for (const GgufTensor& tensor : file.tensors())
            total += size_when_packed(tensor);
        weights->owned_ = std::make_unique<AlignedBytes>(total);
    }

    Matrix matrix(const std::string& name, std::int64_t rows, std::int64_t cols) {
        const GgufTensor& tensor = take(name, 2, rows, cols);
        const bool widen = tensor.dtype == DType::f16;
        Matrix result{widen ? DType::f32 : tensor.dtype, rows, cols, {}};
        const std::int64_t n_panels = (rows + panel_rows - 1) / panel_rows;
        const std::size_t size = panel_bytes(result.dtype, cols);
        std::uint8_t* out = allocate(size * static_cast<std::size_t>(n_panels));
        result.panels = {out, static_cast<std::int64_t>(size), rows, cols};
        FirstBad bad;
        // Rows as floats, for f16 only: taken here, as nothing may throw on the threads.
        std::vector<float> widened(widen ? static_cast<std::size_t>(rows * cols) : 0);
        threads_.parallel_for(
            threads_for(rows * cols), n_panels, [&](std::int64_t begin, std::int64_t end) {
                for (std::int64_t panel = begin; panel < end; ++panel) {
                    const std::int64_t first = panel * panel_rows * cols;
                    const std::int64_t n = std::min(panel_rows * cols, rows * cols - first);
                    bad.look(tensor, first, n);
                    if (widen) to_floats(tensor, first, n, widened.data() + first);
                    pack_panels(kernels_, result.dtype,
                                widen ? reinterpret_cast<const std::uint8_t*>(widened.data())
                                      : tensor.bytes.data,
                                rows, cols, out, panel, panel + 1);
                }
            });
        bad.refuse(file_, tensor);
        return result;
    }

    const float* vector(const std::string& name, std::int64_t size) {
        const GgufTensor& tensor = take(name, 1, 1, size);
        if (is_block_format(tensor.dtype)) {
            throw Error(Status::format_error, file_.name() + ": tensor " + name + " is " +
                                                  dtype_name(tensor.dtype) +
                                                  "; a vector must be f32");
        }
        FirstBad bad;
        bad.look(tensor, 0, size);
        bad.refuse(file_, tensor);
        auto* out = reinterpret_cast<float*>(allocate(static_cast<std::size_t>(size) * 4));
        to_floats(tensor, 0, size, out);
        return out;
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
        taken_.insert(name);
        const std::uint64_t n_values = tensor->rows * tensor->cols;
        weights_->n_bytes += tensor->dtype == DType::f16 ? 4 * n_values : tensor->bytes.size;
        weights_->n_parameters += n_values;
        return *tensor;
    }

    // A thread for less than a few hundred thousand values costs more than it saves.
    int threads_for(std::int64_t n_values) const {
        return n_values < (1 << 18) ? 1 : threads_.size();
    }

    std::uint8_t* allocate(std::size_t n_bytes) {
        std::uint8_t* result = weights_->owned_->data() + n_used_;
        n_used_ += round_up(n_bytes);
        return result;
    }

    static std::size_t round_up(std::size_t n_bytes) { return (n_bytes + 63) / 64 * 64; }

    static std::size_t size_when_packed(const GgufTensor& tensor) {
        if (tensor.n_dims == 1) return round_up(static_cast<std::size_t>(tensor.cols) * 4);
        const std::size_t n_panels = (tensor.rows + panel_rows - 1) / panel_rows;
        const DType dtype = tensor.dtype == DType::f16 ? DType::f32 : tensor.dtype;
        return n_panels * panel_bytes(dtype, static_cast<std::int64_t>(tensor.cols));
    }

    const GgufFile& file_;
    const KernelTable& kernels_;
    Threads& threads_;
    Weights* weights_;
    std::size_t n_used_ = 0;
    std::set<std::string> taken_;
};

Weights::Weights(const GgufFile& file, const Config& config, const KernelTable& kernels,
                 Threads& threads) {
    WeightReader reader(file, kernels, threads, this);
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

AlignedBytes::AlignedBytes(std::size_t size)
    : size_(size),
      alignment_(size < large_page ? 64 : large_page),
      data_(static_cast<std::uint8_t*>(allocate(size_, alignment_))) {
    if (data_ == nullptr) throw std::bad_alloc();
#ifdef __linux__
    if (size >= large_page) madvise(data_, size, MADV_HUGEPAGE);
#endif
}

AlignedBytes::~AlignedBytes() { release(data_, size_, alignment_); }

}  // namespace tinyllama

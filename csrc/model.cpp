#include "model.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <new>
#include <utility>

#include "forward.h"
#include "hash.h"
#include "kernels/cpu.h"
#include "parallel.h"

namespace tinyllama {
namespace {

const KernelTable* choose_kernels(const std::string& wanted) {
    std::string isa = wanted;
    if (isa.empty()) {
        const char* environment = std::getenv("TINYLLAMA_ISA");
        if (environment != nullptr) isa = environment;
    }
    if (const KernelTable* kernels = find_kernels(isa.empty() ? nullptr : isa.c_str())) {
        return kernels;
    }
    std::string known;
    for (const char* const* name = supported_isas(); *name != nullptr; ++name) {
        known += known.empty() ? *name : std::string(", ") + *name;
    }
    throw Error(Status::invalid_argument, "isa is '" + isa + "'; this CPU can run: auto, " + known);
}

// Pair i turns by rope_theta^(-2i / head_dim) / rope_factors[i] per position (Su et al., arXiv
// 2104.09864), in double because positions can be large.
std::vector<double> frequencies_of(const Config& config) {
    std::vector<double> result;
    for (std::size_t i = 0; i < config.rope_factors.size(); ++i) {
        const double exponent = -2.0 * static_cast<double>(i) / config.head_dim;
        result.push_back(std::pow(static_cast<double>(config.rope_theta), exponent) /
                         static_cast<double>(config.rope_factors[i]));
    }
    return result;
}

// What decides what a model says. The order of tensors does not, nor how long a context may be.
std::uint64_t hash_of(const GgufFile& file, const Config& config, Threads& threads) {
    Hasher hasher;
    for (const std::int32_t value :
         {config.dim, config.hidden_units, config.n_layers, config.n_heads, config.n_kv_heads,
          config.head_dim, config.vocab_size})
        hasher.add_number(value);
    hasher.add_number(config.rope_theta);
    hasher.add_number(config.norm_eps);
    for (const float factor : config.rope_factors)
        hasher.add_number(factor);
    constexpr std::uint64_t part = std::uint64_t{1} << 20;
    std::uint64_t sum = 0;
    for (const GgufTensor& tensor : file.tensors()) {
        std::vector<std::uint64_t> parts(static_cast<std::size_t>(tensor.bytes.size / part + 1));
        const auto n_parts = static_cast<std::int64_t>(parts.size());
        const int n_threads = n_parts < 4 ? 1 : threads.size();
        threads.parallel_for(n_threads, n_parts, [&](std::int64_t begin, std::int64_t end) {
            for (auto i = static_cast<std::size_t>(begin); i < static_cast<std::size_t>(end); ++i) {
                const std::size_t first = i * part;
                const std::size_t size = std::min<std::size_t>(part, tensor.bytes.size - first);
                parts[i] = hash64({tensor.bytes.data + first, size});
            }
        });
        Hasher one;
        one.add(tensor.name);
        one.add_number(static_cast<std::uint32_t>(tensor.dtype));
        for (const std::uint64_t hash : parts)
            one.add_number(hash);
        sum += one.result();
    }
    hasher.add_number(sum);
    return hasher.result();
}

}  // namespace

std::shared_ptr<const Model> Model::open(const FileBytes& bytes, const std::string& name,
                                         const ModelOptions& options) {
    if (options.n_threads < 0 || options.n_threads > 1024) {
        throw Error(Status::invalid_argument, "n_threads is " + std::to_string(options.n_threads) +
                                                  "; it must be in [0, 1024]");
    }
    const KernelTable* kernels = choose_kernels(options.isa);
    const int n_threads = options.n_threads > 0 ? options.n_threads : available_cores();
    const KvType kv_type = options.kv_dtype.empty() ? KvType::f32 : find_kv_type(options.kv_dtype);
    const GgufFile file = GgufFile::parse(bytes.span(), name);
    Config config = read_config(file);
    if (options.max_seq_len < 0 || options.max_seq_len > config.max_seq_len) {
        throw Error(Status::invalid_argument,
                    "max_seq_len is " + std::to_string(options.max_seq_len) + "; " + name +
                        " allows at most " + std::to_string(config.max_seq_len));
    }
    if (options.max_seq_len > 0) config.max_seq_len = options.max_seq_len;
    // The constructor is private, so make_shared cannot reach it.
    const std::shared_ptr<Model> model(
        new Model(name, file, config, kernels, n_threads, options.tasks, kv_type));
    if (options.n_threads == 0) model->choose_threads_alone();
    return model;
}

Model::Model(const std::string& name, const GgufFile& file, const Config& config,
             const KernelTable* kernels, int n_threads, const TaskSystem& tasks, KvType kv_type)
    : name_(name),
      config_(config),
      threads_(n_threads, tasks),
      tokenizer_(file),
      weights_(file, config, *kernels, threads_),
      kernels_(kernels),
      n_threads_alone_(n_threads),
      kv_pool_(std::make_shared<KvPool>(
          KvLayout{config.n_layers, config.n_kv_heads, config.head_dim, kv_type})),
      rope_frequencies_(frequencies_of(config)),
      hash_(hash_of(file, config, threads_)) {
    if (tokenizer_.vocab_size() != config_.vocab_size) {
        throw Error(Status::format_error,
                    name_ + ": the tokenizer has " + std::to_string(tokenizer_.vocab_size()) +
                        " tokens, the model's vocab_size is " + std::to_string(config_.vocab_size));
    }
}

Model::~Model() = default;

// Tries n, n / 2, ..., 1 threads, a few steps each, as long as fewer cost little: waking others has
// a price that these steps, one right after the other, do not show. A long step needs no trial.
void Model::choose_threads_alone() {
    constexpr std::chrono::milliseconds long_step(4);
    KvCache cache(kv_pool_);
    cache.reserve(0, 1);
    std::vector<float> logits(static_cast<std::size_t>(config_.vocab_size));
    const std::vector<Row> rows{{&cache, 0, 0, logits.data()}};
    Pass pass(*this);
    Clock::duration best = Clock::duration::max();
    for (int n = threads_.size(), chosen = n; n >= 1 && threads_.size() > 1; n /= 2) {
        n_threads_alone_ = n;
        Clock::duration shortest = Clock::duration::max();
        for (int step = 0; step < 5; ++step) {
            const Clock::time_point start = Clock::now();
            pass.run(rows);
            shortest = std::min(shortest, Clock::now() - start);
            if (step == 1 && shortest > long_step) return;
        }
        if (n < threads_.size() && shortest > best + best / 10) {
            n_threads_alone_ = chosen;
            return;
        }
        chosen = n;
        best = std::min(best, shortest);
    }
}

const TokenTrie& Model::token_trie() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (token_trie_ == nullptr) token_trie_ = std::make_unique<TokenTrie>(tokenizer_);
    return *token_trie_;
}

std::unique_ptr<Pass> Model::borrow_pass() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (passes_.empty()) return std::make_unique<Pass>(*this);
    std::unique_ptr<Pass> pass = std::move(passes_.back());
    passes_.pop_back();
    return pass;
}

void Model::return_pass(std::unique_ptr<Pass> pass) const noexcept {
    const std::lock_guard<std::mutex> lock(mutex_);
    try {
        passes_.push_back(std::move(pass));
    } catch (const std::bad_alloc&) {
        // Then there is one less to lend.
    }
}

}  // namespace tinyllama

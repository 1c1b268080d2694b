// A model: weights, tokenizer and hyperparameters, with the kernels chosen to run them.
// Immutable once opened, shared by sessions and threads.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "config.h"
#include "constraint.h"
#include "file_bytes.h"
#include "kernels/kernel_table.h"
#include "kv_cache.h"
#include "parallel.h"
#include "tokenizer.h"
#include "weights.h"

namespace tinyllama {

class Pass;

struct ModelOptions {
    int n_threads = 0;             // 0: as many as physical cores allowed to the process
    std::string isa;               // "": $TINYLLAMA_ISA, else the best this CPU can run
    std::string kv_dtype;          // of the cached keys and values: "" or "f32", "bf16", "int8"
    std::int32_t max_seq_len = 0;  // 0: the file's
    TaskSystem tasks{};  // whose threads work beside the caller's; else threads of our own
};

class Model {
public:
    // `name` stands for the model in messages. Throws Error for whatever is wrong with the file or
    // the options, before anything else is changed.
    // The bytes are not needed any more once it is open.
    static std::shared_ptr<const Model> open(const FileBytes& bytes, const std::string& name,
                                             const ModelOptions& options);
    ~Model();

    const std::string& name() const { return name_; }
    const Config& config() const { return config_; }
    const Tokenizer& tokenizer() const { return tokenizer_; }
    const Weights& weights() const { return weights_; }
    const KernelTable& kernels() const { return *kernels_; }
    Threads& threads() const { return threads_; }
    // For a step of one row, which in a tiny model may be over before other threads are awake.
    int n_threads_alone() const { return n_threads_alone_; }
    const KvLayout& kv_layout() const { return kv_pool_->layout(); }
    const std::shared_ptr<KvPool>& kv_pool() const { return kv_pool_; }
    // The angle by which pair i of a head turns per position, (head_dim / 2).
    const std::vector<double>& rope_frequencies() const { return rope_frequencies_; }

    // Of hyperparameters and weights as in the file: the same on every machine. The tokenizer has
    // its own.
    std::uint64_t hash() const { return hash_; }

    // Made when it is first asked for.
    const TokenTrie& token_trie() const;

    // A forward pass with its memory, lent until returned.
    std::unique_ptr<Pass> borrow_pass() const;
    void return_pass(std::unique_ptr<Pass> pass) const noexcept;

private:
    Model(const std::string& name, const GgufFile& file, const Config& config,
          const KernelTable* kernels, int n_threads, const TaskSystem& tasks, KvType kv_type);
    void choose_threads_alone();

    std::string name_;
    Config config_;
    mutable Threads threads_;
    Tokenizer tokenizer_;
    Weights weights_;
    const KernelTable* kernels_;
    int n_threads_alone_;
    std::shared_ptr<KvPool> kv_pool_;
    std::vector<double> rope_frequencies_;
    std::uint64_t hash_;
    mutable std::mutex mutex_;
    mutable std::vector<std::unique_ptr<Pass>> passes_;
    mutable std::unique_ptr<TokenTrie> token_trie_;
};

}  // namespace tinyllama

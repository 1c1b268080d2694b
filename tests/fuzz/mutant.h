// Small valid GGUF models, and seeded mutants of them that know the format.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace fuzz {

// SplitMix64: mutant i of a seed is a pure function of (seed, i).
class Random {
public:
    Random(std::uint64_t seed, std::uint64_t i) : state_(seed * 0x9e3779b97f4a7c15u + i) { next(); }
    std::uint64_t next() {
        std::uint64_t z = state_ += 0x9e3779b97f4a7c15u;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        return z ^ (z >> 31);
    }
    std::size_t below(std::size_t n) { return static_cast<std::size_t>(next() % n); }
    bool one_in(std::size_t n) { return below(n) == 0; }
    template <typename T>
    T& pick(std::vector<T>& items) {
        return items[below(items.size())];
    }

private:
    std::uint64_t state_;
};

struct Entry {
    std::string key;
    std::uint32_t type;
    std::string value;  // as written, lengths included
};

struct Tensor {
    std::string name;
    std::vector<std::uint64_t> dims;  // fastest axis first
    std::uint32_t type;
    std::string data;
};

// A model before it is written. The vocabulary is apart, so that a mutant can change one token and
// still be well formed.
struct Tree {
    std::vector<Entry> entries;
    std::vector<std::string> pieces;
    std::vector<float> scores;
    std::vector<std::int32_t> types;
    std::vector<Tensor> tensors;
};

// Tied and untied, f32, f16, bf16, q8_0 and q4_0, multi-head, grouped and multi-query, with and
// without byte tokens, rope scaling and head_dim apart from dim / n_heads.
std::vector<Tree> seed_models();

// One whose passes are worth several threads.
Tree large_model();

std::string write(const Tree& tree);

// One to four changes to the tree (well formed, but for what they say), to the integers of the
// written file (lengths, counts, types and offsets that lie), or to its bytes.
std::string mutate(const Tree& seed, Random& random);
std::string mutate_bytes(std::string bytes, Random& random);

}  // namespace fuzz

#include "mutant.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace fuzz {

namespace {

enum : std::uint32_t {
    u32_type = 4,
    i32_type = 5,
    f32_type = 6,
    bool_type = 7,
    string_type = 8,
    array_type = 9
};
enum : std::uint32_t { f32 = 0, f16 = 1, q4_0 = 2, q8_0 = 8, bf16 = 30 };

template <typename T>
std::string raw(T value) {
    return {reinterpret_cast<const char*>(&value), sizeof(T)};
}

std::string text(const std::string& value) { return raw<std::uint64_t>(value.size()) + value; }

template <typename T>
std::string array(std::uint32_t type, const std::vector<T>& items) {
    std::string out = raw(type) + raw<std::uint64_t>(items.size());
    for (const T& item : items) {
        if constexpr (std::is_same_v<T, std::string>) {
            out += text(item);
        } else {
            out += raw(item);
        }
    }
    return out;
}

Entry u32_entry(const std::string& key, std::uint32_t value) { return {key, u32_type, raw(value)}; }

std::uint64_t data_size(std::uint32_t type, const std::vector<std::uint64_t>& dims) {
    std::uint64_t n = 1;
    for (const std::uint64_t dim : dims)
        n *= dim;
    if (type == q4_0 || type == q8_0) return n / 32 * (type == q4_0 ? 18 : 34);
    return (type == f32 ? 4 : 2) * n;
}

// Small finite weights of any type.
std::string tensor_data(std::uint32_t type, const std::vector<std::uint64_t>& dims,
                        Random& random) {
    std::string data;
    const std::uint64_t size = data_size(type, dims);
    while (data.size() < size) {
        const float x = static_cast<float>(random.below(2001)) / 1000.0f - 1.0f;
        std::uint32_t bits = 0;
        std::memcpy(&bits, &x, sizeof(bits));
        if (type == f32) data += raw(x);
        if (type == bf16) data += raw(static_cast<std::uint16_t>(bits >> 16));
        if (type == f16) data += raw(static_cast<std::uint16_t>(random.below(2) << 15 | 0x3000u));
        if (type == q4_0 || type == q8_0) {
            data += raw(static_cast<std::uint16_t>(0x2000));  // 2^-7
            for (int i = 0; i < (type == q4_0 ? 16 : 32); ++i)
                data += static_cast<char>(random.next());
        }
    }
    return data;
}

struct Shape {
    std::uint32_t dim, hidden_dim, n_layers, n_heads, n_kv_heads, head_dim, type;
    bool tied, byte_tokens;
};

void add_vocabulary(const Shape& shape, Tree* tree) {
    const auto add = [tree](const std::string& piece, std::int32_t type) {
        tree->pieces.push_back(piece);
        tree->scores.push_back(-static_cast<float>(tree->pieces.size()));
        tree->types.push_back(type);
    };
    add("<unk>", 2);
    add("<s>", 3);
    add("</s>", 3);
    constexpr char hex[] = "0123456789ABCDEF";
    for (std::size_t i = 0; shape.byte_tokens && i < 256; ++i) {
        add(std::string("<0x") + hex[i / 16] + hex[i % 16] + ">", 6);
    }
    for (const char* piece : {"\xe2\x96\x81", "a", "b", "ab", "aba", "\xe7\x8b\x90"})
        add(piece, 1);
    add(std::string("\xe2\x96\x81") + "a", 1);
    add("<go>", 4);
    add("ba", 5);
}

Tree seed_model(const Shape& s, Random& random) {
    Tree tree;
    add_vocabulary(s, &tree);
    tree.entries = {
        {"general.architecture", string_type, text("llama")},
        u32_entry("llama.context_length", 16),
        u32_entry("llama.embedding_length", s.dim),
        u32_entry("llama.block_count", s.n_layers),
        u32_entry("llama.feed_forward_length", s.hidden_dim),
        u32_entry("llama.attention.head_count", s.n_heads),
        u32_entry("llama.attention.head_count_kv", s.n_kv_heads),
        u32_entry("llama.attention.key_length", s.head_dim),
        u32_entry("llama.rope.dimension_count", s.head_dim),
        {"llama.attention.layer_norm_rms_epsilon", f32_type, raw(1e-5f)},
        {"tokenizer.ggml.model", string_type, text("llama")},
        u32_entry("tokenizer.ggml.bos_token_id", 1),
        u32_entry("tokenizer.ggml.eos_token_id", 2),
    };
    if (!s.tied) {
        tree.entries.push_back({"llama.rope.scaling.type", string_type, text("linear")});
        tree.entries.push_back({"llama.rope.scaling.factor", f32_type, raw(2.0f)});
        tree.entries.push_back({"tokenizer.ggml.remove_extra_whitespaces", bool_type, raw('\1')});
    }
    const auto add = [&](const std::string& name, std::vector<std::uint64_t> dims) {
        const std::uint32_t type = dims.size() == 1 ? f32 : s.type;
        tree.tensors.push_back({name, dims, type, tensor_data(type, dims, random)});
    };
    const std::uint64_t q_dim = s.n_heads * s.head_dim;
    const std::uint64_t kv_dim = s.n_kv_heads * s.head_dim;
    add("token_embd.weight", {s.dim, tree.pieces.size()});
    for (std::uint32_t i = 0; i < s.n_layers; ++i) {
        const std::string layer = "blk." + std::to_string(i) + ".";
        add(layer + "attn_norm.weight", {s.dim});
        add(layer + "attn_q.weight", {s.dim, q_dim});
        add(layer + "attn_k.weight", {s.dim, kv_dim});
        add(layer + "attn_v.weight", {s.dim, kv_dim});
        add(layer + "attn_output.weight", {q_dim, s.dim});
        add(layer + "ffn_norm.weight", {s.dim});
        add(layer + "ffn_gate.weight", {s.dim, s.hidden_dim});
        add(layer + "ffn_up.weight", {s.dim, s.hidden_dim});
        add(layer + "ffn_down.weight", {s.hidden_dim, s.dim});
    }
    add("output_norm.weight", {s.dim});
    if (!s.tied) {
        add("output.weight", {s.dim, tree.pieces.size()});
        const std::vector<float> factors(s.head_dim / 2, 2.0f);
        tree.tensors.push_back(
            {"rope_freqs.weight", {factors.size()}, f32, array(f32_type, factors).substr(12)});
    }
    return tree;
}

// An integer of the written file: where it stands and how wide it is.
struct Field {
    std::size_t at;
    std::size_t width;
};

// The integers inside a value: itself, its length, or the lengths of an array's strings.
void list_fields(const Entry& entry, std::size_t at, std::vector<Field>* fields,
                 std::vector<Field>* minor) {
    if (entry.type != array_type) {
        // Several times: hyperparameters are few among the fields, and matter more.
        fields->insert(fields->end(), 4, {at, std::min<std::size_t>(entry.value.size(), 8)});
        return;
    }
    fields->push_back({at, 4});
    fields->push_back({at + 4, 8});
    for (std::size_t i = 12; i + 8 <= entry.value.size();) {
        minor->push_back({at + i, 8});
        std::uint64_t length = 0;
        std::memcpy(&length, entry.value.data() + i, sizeof(length));
        i += entry.value[0] == string_type ? 8 + static_cast<std::size_t>(length) : 8;
    }
}

std::string write_fields(const Tree& tree, std::vector<Field>* fields, std::vector<Field>* minor) {
    std::vector<Entry> entries = tree.entries;
    const auto add_array = [&](const char* name, const std::string& value) {
        entries.push_back({std::string("tokenizer.ggml.") + name, array_type, value});
    };
    if (!tree.pieces.empty()) add_array("tokens", array(string_type, tree.pieces));
    if (!tree.scores.empty()) add_array("scores", array(f32_type, tree.scores));
    if (!tree.types.empty()) add_array("token_type", array(i32_type, tree.types));

    std::string out = "GGUF" + raw<std::uint32_t>(3) + raw<std::uint64_t>(tree.tensors.size()) +
                      raw<std::uint64_t>(entries.size());
    fields->insert(fields->end(), {{4, 4}, {8, 8}, {16, 8}});
    for (const Entry& entry : entries) {
        fields->push_back({out.size(), 8});
        out += text(entry.key);
        fields->push_back({out.size(), 4});
        out += raw(entry.type);
        list_fields(entry, out.size(), fields, minor);
        out += entry.value;
    }
    constexpr std::size_t alignment = 32;
    const auto padded = [](std::size_t n) { return (n + alignment - 1) / alignment * alignment; };
    std::uint64_t offset = 0;
    for (const Tensor& tensor : tree.tensors) {
        fields->push_back({out.size(), 8});
        out += text(tensor.name);
        fields->push_back({out.size(), 4});
        out += raw(static_cast<std::uint32_t>(tensor.dims.size()));
        for (const std::uint64_t dim : tensor.dims) {
            fields->push_back({out.size(), 8});
            out += raw(dim);
        }
        fields->push_back({out.size(), 4});
        out += raw(tensor.type);
        fields->push_back({out.size(), 8});
        out += raw(offset);
        offset += padded(tensor.data.size());
    }
    out.resize(padded(out.size()));
    for (const Tensor& tensor : tree.tensors) {
        out += tensor.data;
        out.resize(padded(out.size()));
    }
    return out;
}

std::uint64_t boundary(std::uint64_t current, std::size_t file_size, Random& random) {
    const std::uint64_t power = std::uint64_t{1} << random.below(64);
    switch (random.below(10)) {
        case 0:
            return 0;
        case 1:
            return 1;
        case 2:
            return current + 1;
        case 3:
            return current - 1;
        case 4:
            return current * 2;
        case 5:
            return power;
        case 6:
            return power - 1;
        case 7:
            return ~std::uint64_t{0} - random.below(64);
        case 8:
            return file_size - random.below(64);
        default:
            return random.below(40);
    }
}

void lie(std::string* bytes, const Field& field, Random& random) {
    if (field.width == 0) return;
    std::uint64_t value = 0;
    std::memcpy(&value, bytes->data() + field.at, field.width);
    value = boundary(value, bytes->size(), random);
    std::memcpy(bytes->data() + field.at, &value, field.width);
}

template <typename T>
void drop_copy_or_swap(std::vector<T>* items, Random& random) {
    if (items->empty()) return;
    const std::size_t i = random.below(items->size());
    const std::size_t j = random.below(items->size());
    switch (random.below(3)) {
        case 0:
            items->erase(items->begin() + static_cast<std::ptrdiff_t>(i));
            break;
        case 1: {
            const T copy = (*items)[i];
            items->insert(items->begin() + static_cast<std::ptrdiff_t>(j), copy);
            break;
        }
        default:
            std::swap((*items)[i], (*items)[j]);
    }
}

void change_token(Tree* tree, Random& random) {
    if (tree->pieces.empty() || tree->scores.empty() || tree->types.empty()) return;
    static const std::vector<std::string> pieces = {"",
                                                    "<0x41>",
                                                    "<0x-1>",
                                                    "<0xZZ>",
                                                    "a",
                                                    "ab",
                                                    "\xe2\x96\x81",
                                                    " ",
                                                    "\xff",
                                                    "\xe2\x96",
                                                    std::string("\0", 1),
                                                    "\xf0\x9f\xa6\x8a",
                                                    std::string(300, 'a'),
                                                    "<s>",
                                                    "aa",
                                                    "aaaa"};
    constexpr float infinity = std::numeric_limits<float>::infinity();
    static const std::vector<float> scores = {0.0f,      -1e9f,         3e38f, infinity,
                                              -infinity, std::nanf(""), -5.0f, -0.0f};
    switch (random.below(4)) {
        case 0:
            random.pick(tree->pieces) = pieces[random.below(pieces.size())];
            break;
        case 1:
            random.pick(tree->scores) = scores[random.below(scores.size())];
            break;
        case 2:
            random.pick(tree->types) = static_cast<std::int32_t>(random.below(8)) -
                                       static_cast<std::int32_t>(random.one_in(8));
            break;
        default:
            if (random.one_in(2)) {
                std::swap(random.pick(tree->pieces), random.pick(tree->pieces));
            } else if (random.one_in(2)) {
                drop_copy_or_swap(&tree->pieces, random);
            } else {
                drop_copy_or_swap(&tree->types, random);
            }
    }
}

void change_tensor(Tree* tree, Random& random) {
    if (tree->tensors.empty()) return;
    Tensor& tensor = random.pick(tree->tensors);
    switch (random.below(6)) {
        case 0:
            if (!tensor.name.empty()) {
                tensor.name[random.below(tensor.name.size())] = static_cast<char>(random.next());
            }
            break;
        case 1:
            tensor.name = tree->tensors[random.below(tree->tensors.size())].name;
            break;
        case 2: {
            const std::uint32_t types[] = {f32, f16, q4_0, q8_0, bf16, 3, 12};
            tensor.type = types[random.below(7)];
            break;
        }
        case 3:
            if (!tensor.dims.empty()) random.pick(tensor.dims) = 1 + random.below(64);
            break;
        case 4:
            tensor.dims.push_back(1);
            break;
        default:
            for (std::size_t i = 0; i < 4 && !tensor.data.empty(); ++i) {
                const std::size_t at = random.below(tensor.data.size());
                tensor.data[at] = static_cast<char>(random.one_in(2) ? 0xff : random.next());
            }
    }
    if (random.one_in(2)) tensor.data.resize(data_size(tensor.type, tensor.dims));
}

void change_entry(Tree* tree, Random& random) {
    if (tree->entries.empty()) return;
    Entry& entry = random.pick(tree->entries);
    switch (random.below(5)) {
        case 0:
            entry.type = static_cast<std::uint32_t>(random.below(14));
            break;
        case 1:
            if (!entry.key.empty()) {
                entry.key[random.below(entry.key.size())] = static_cast<char>(random.next());
            }
            break;
        case 2:
            entry.value.resize(random.below(entry.value.size() + 8));
            break;
        case 3:
            if (!entry.value.empty()) {
                entry.value[random.below(entry.value.size())] = static_cast<char>(random.next());
            }
            break;
        default: {
            static const std::vector<Entry> added = {
                u32_entry("general.alignment", 0),
                u32_entry("general.alignment", 1),
                u32_entry("general.alignment", 64),
                u32_entry("llama.vocab_size", 12),
                {"llama.rope.freq_base", f32_type, raw(1e-38f)},
                {"llama.rope.freq_base", f32_type, raw(3e38f)},
                {"llama.rope.scale_linear", f32_type, raw(1e38f)},
                {"tokenizer.ggml.add_space_prefix", bool_type, raw('\0')},
                {"tokenizer.ggml.add_bos_token", bool_type, raw('\0')},
                u32_entry("tokenizer.ggml.unknown_token_id", 5)};
            tree->entries.push_back(added[random.below(added.size())]);
        }
    }
}

}  // namespace

std::vector<Tree> seed_models() {
    Random random(1, 0);
    std::vector<Tree> trees;
    for (const Shape& shape :
         {Shape{4, 6, 1, 2, 2, 2, f32, true, false}, Shape{8, 12, 2, 4, 2, 2, bf16, false, true},
          Shape{32, 32, 1, 2, 1, 16, q8_0, true, false},
          Shape{6, 10, 1, 3, 1, 4, f16, false, false},
          Shape{64, 32, 1, 2, 1, 32, q4_0, false, false},
          Shape{32, 64, 2, 4, 4, 8, q8_0, false, true}}) {
        trees.push_back(seed_model(shape, random));
    }
    return trees;
}

Tree large_model() {
    Random random(2, 0);
    return seed_model(Shape{256, 512, 2, 8, 4, 32, f32, false, true}, random);
}

std::string write(const Tree& tree) {
    std::vector<Field> fields;
    return write_fields(tree, &fields, &fields);
}

std::string mutate_bytes(std::string bytes, Random& random) {
    if (bytes.empty()) return bytes;
    const std::size_t at = random.below(bytes.size());
    const std::size_t length = random.below(std::min<std::size_t>(bytes.size() - at, 64) + 1);
    switch (random.below(5)) {
        case 0:
            bytes.resize(at);
            break;
        case 1:
            bytes.erase(at, length);
            break;
        case 2:
            bytes.insert(at, bytes.substr(random.below(bytes.size()), length));
            break;
        case 3:
            bytes[at] = static_cast<char>(bytes[at] ^ (1 << random.below(8)));
            break;
        default:
            bytes[at] = static_cast<char>(random.next());
    }
    return bytes;
}

std::string mutate(const Tree& seed, Random& random) {
    Tree tree = seed;
    const std::size_t n_changes = random.below(4);
    for (std::size_t i = 0; i < n_changes; ++i) {
        switch (random.below(8)) {
            case 0:
                drop_copy_or_swap(&tree.entries, random);
                break;
            case 1:
                drop_copy_or_swap(&tree.tensors, random);
                break;
            case 2:
                change_entry(&tree, random);
                break;
            case 3:
            case 4:
                change_tensor(&tree, random);
                break;
            default:
                change_token(&tree, random);
        }
    }
    std::vector<Field> fields;
    std::vector<Field> minor;
    std::string bytes = write_fields(tree, &fields, &minor);
    if (n_changes > 0 && random.one_in(2)) return bytes;
    if (random.one_in(2)) {
        lie(&bytes, random.pick(minor.empty() || !random.one_in(4) ? fields : minor), random);
        if (random.one_in(2)) return bytes;
    }
    return mutate_bytes(std::move(bytes), random);
}

}  // namespace fuzz

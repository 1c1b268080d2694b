// Keys and values of one timeline, in blocks of 32 positions that timelines with a common past
// share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels/kernel_table.h"

namespace tinyllama {

// "f32", "bf16" or "int8". Throws Error(invalid_argument) for any other name.
KvType find_kv_type(const std::string& name);
const char* kv_type_name(KvType type);

// How the blocks of a model are laid out: layer by layer, within a layer head by head, a head's
// part as in kernel_table.h.
struct KvLayout {
    std::int64_t n_layers;
    std::int64_t n_kv_heads;
    std::int64_t head_dim;
    KvType type;

    std::int64_t head_bytes() const;  // a multiple of 64
    std::int64_t block_bytes() const { return n_layers * n_kv_heads * head_bytes(); }
    // What a position costs a timeline, all layers together. Exact: blocks have no other bytes.
    std::int64_t bytes_per_position() const { return block_bytes() / kv_block; }
};

class KvCache {
public:
    explicit KvCache(const KvLayout& layout) : layout_(layout) {}
    KvCache(KvCache&&) = default;
    KvCache& operator=(KvCache&&) = default;

    const KvLayout& layout() const { return layout_; }

    // Makes positions [begin, end) writable; those before begin stay, those from begin on are
    // garbage. To be called before they are written. What is there is never moved, but the list
    // that head() points at may be. Throws std::bad_alloc; positions before begin are then as they
    // were.
    void reserve(std::int32_t begin, std::int32_t end);

    // One key head of one layer; valid until the next reserve().
    KvHead head(std::int32_t layer, std::int32_t kv_head) const;

    // A cache with the same first n_positions. Whole blocks are shared from then on, and copied
    // when either cache is rewound and written within them; the rest of a block is copied now.
    KvCache share(std::int32_t n_positions);

private:
    // Keeps alive the allocation that the block is part of.
    using Block = std::shared_ptr<std::uint8_t>;

    void append(Block block);
    void allocate(std::size_t n_blocks);
    Block copy_of(std::size_t block) const;

    KvLayout layout_;
    std::vector<Block> blocks_;
    std::vector<std::uint8_t*> pointers_;  // of blocks_, for the kernels
    std::size_t n_shared_ = 0;  // this many first blocks may belong to other caches too: read only
};

}  // namespace tinyllama

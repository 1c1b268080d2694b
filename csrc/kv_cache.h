// Keys and values of one timeline, in blocks of 32 positions that timelines with a common past
// share.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
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

    std::int64_t head_bytes() const { return kv_part_bytes(type, head_dim); }  // a multiple of 64
    std::int64_t block_bytes() const { return n_layers * n_kv_heads * head_bytes(); }
    // What a position costs a timeline, all layers together. Exact: blocks have no other bytes.
    std::int64_t bytes_per_position() const { return block_bytes() / kv_block; }
};

// Where the blocks of a model's caches come from, in slabs. Any thread may use it.
class KvPool {
public:
    struct Slab;
    struct Block {
        std::uint8_t* data;
        Slab* slab;
        std::atomic<int> n_users{0};
        Block* next_free = nullptr;  // of its slab
        // Begins as zeros. Kernels read, and forget, what lies beside a timeline's positions:
        // floats of an earlier one do no harm, but in memory fresh from malloc there are subnormal
        // numbers, each of which takes a hundred cycles.
        bool was_written = false;
        void clear(std::size_t n_bytes);
    };

    explicit KvPool(const KvLayout& layout);
    ~KvPool();
    KvPool(const KvPool&) = delete;
    KvPool& operator=(const KvPool&) = delete;

    const KvLayout& layout() const { return layout_; }

    // Appends n blocks with one user each; their bytes are anything. Throws std::bad_alloc.
    void take(std::size_t n, std::vector<Block*>* blocks);
    // A user less. Of a slab without users the memory is given back, unless someone keeps it.
    void release(Block* block);

    // Keeps all memory from now on, until as many calls of let_go() have come, with so many blocks
    // ready to be taken, in memory that was touched. Throws std::bad_alloc.
    void keep(std::size_t n_blocks);
    void let_go();

    // Of blocks that have users; a block of several once.
    std::int64_t bytes_in_use();

private:
    void add_slab(std::size_t n);
    void drop_empty_slabs();

    KvLayout layout_;
    std::mutex mutex_;
    std::vector<std::unique_ptr<Slab>> slabs_;
    std::size_t n_free_ = 0;
    std::size_t n_used_ = 0;
    int n_keepers_ = 0;
};

class KvCache {
public:
    explicit KvCache(std::shared_ptr<KvPool> pool) : pool_(std::move(pool)) {}
    KvCache(KvCache&&) = default;
    KvCache& operator=(KvCache&& other) noexcept;
    ~KvCache() { shrink(0); }

    const KvLayout& layout() const { return pool_->layout(); }

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

    // The bytes of a block, and one more that is a copy of such bytes: they fit caches of the same
    // layout only.
    const std::uint8_t* block(std::size_t i) const { return pointers_[i]; }
    void append_copy(const std::uint8_t* data);

private:
    void shrink(std::size_t n_blocks);
    void grow(std::size_t n_blocks);

    std::shared_ptr<KvPool> pool_;
    std::vector<KvPool::Block*> blocks_;
    std::vector<std::uint8_t*> pointers_;  // of blocks_, for the kernels
    std::size_t n_shared_ = 0;  // this many first blocks may belong to other caches too: read only
};

}  // namespace tinyllama

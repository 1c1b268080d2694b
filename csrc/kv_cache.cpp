#include "kv_cache.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "status.h"
#include "weights.h"

namespace tinyllama {

KvType find_kv_type(const std::string& name) {
    for (const KvType type : {KvType::f32, KvType::bf16, KvType::int8}) {
        if (name == kv_type_name(type)) return type;
    }
    throw Error(Status::invalid_argument,
                "kv_dtype is '" + name + "'; it must be f32, bf16 or int8");
}

const char* kv_type_name(KvType type) {
    switch (type) {
        case KvType::f32:
            return "f32";
        case KvType::bf16:
            return "bf16";
        default:
            return "int8";
    }
}

void KvPool::Block::clear(std::size_t n_bytes) {
    std::memset(data, 0, n_bytes);
    was_written = true;
}

struct KvPool::Slab {
    Slab(std::size_t n, std::size_t block_bytes) : memory(size_of(n, block_bytes)), blocks(n) {
        for (std::size_t i = n; i-- > 0;) {
            blocks[i].data = memory.data() + i * block_bytes;
            blocks[i].slab = this;
            blocks[i].next_free = first_free;
            first_free = &blocks[i];
        }
    }

    static std::size_t size_of(std::size_t n, std::size_t block_bytes) {
        std::uint64_t size = 0;
        if (!checked_mul(n, block_bytes, &size)) throw std::bad_alloc();
        return static_cast<std::size_t>(size);
    }

    AlignedBytes memory;
    std::vector<Block> blocks;
    Block* first_free = nullptr;
    std::size_t n_used = 0;
};

KvPool::KvPool(const KvLayout& layout) : layout_(layout) {}
KvPool::~KvPool() = default;

void KvPool::take(std::size_t n, std::vector<Block*>* blocks) {
    const std::lock_guard<std::mutex> lock(mutex_);
    blocks->reserve(blocks->size() + n);
    if (n > n_free_) add_slab(n - n_free_);
    for (const auto& slab : slabs_) {
        for (; n > 0 && slab->first_free != nullptr; --n) {
            Block* const block = slab->first_free;
            slab->first_free = block->next_free;
            slab->n_used += 1;
            n_free_ -= 1;
            n_used_ += 1;
            block->n_users.store(1, std::memory_order_relaxed);
            blocks->push_back(block);
        }
    }
}

void KvPool::release(Block* block) {
    if (block->n_users.fetch_sub(1, std::memory_order_acq_rel) > 1) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    Slab* const slab = block->slab;
    block->next_free = slab->first_free;
    slab->first_free = block;
    slab->n_used -= 1;
    n_free_ += 1;
    n_used_ -= 1;
    if (slab->n_used == 0 && n_keepers_ == 0) drop_empty_slabs();
}

void KvPool::keep(std::size_t n_blocks) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (n_blocks > n_free_) {
        add_slab(n_blocks - n_free_);
        for (Block& block : slabs_.back()->blocks)
            block.clear(static_cast<std::size_t>(layout_.block_bytes()));
    }
    n_keepers_ += 1;
}

void KvPool::let_go() {
    const std::lock_guard<std::mutex> lock(mutex_);
    n_keepers_ -= 1;
    if (n_keepers_ == 0) drop_empty_slabs();
}

std::int64_t KvPool::bytes_in_use() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return static_cast<std::int64_t>(n_used_) * layout_.block_bytes();
}

void KvPool::add_slab(std::size_t n) {
    slabs_.reserve(slabs_.size() + 1);
    slabs_.push_back(std::make_unique<Slab>(n, static_cast<std::size_t>(layout_.block_bytes())));
    n_free_ += n;
}

void KvPool::drop_empty_slabs() {
    std::size_t n_left = 0;
    for (auto& slab : slabs_) {
        if (slab->n_used == 0) {
            n_free_ -= slab->blocks.size();
        } else {
            slabs_[n_left++].swap(slab);
        }
    }
    slabs_.resize(n_left);
}

KvCache& KvCache::operator=(KvCache&& other) noexcept {
    pool_.swap(other.pool_);
    blocks_.swap(other.blocks_);
    pointers_.swap(other.pointers_);
    std::swap(n_shared_, other.n_shared_);
    return *this;
}

void KvCache::reserve(std::int32_t begin, std::int32_t end) {
    const auto first = static_cast<std::size_t>(begin / kv_block);
    const auto needed = static_cast<std::size_t>((end + kv_block - 1) / kv_block);
    if (first < n_shared_) {
        // Of the block that begin cuts, the positions before it are wanted; of later ones, nothing.
        KvCache kept(pool_);
        if (begin % kv_block != 0) kept.append_copy(pointers_[first]);
        shrink(first);
        n_shared_ = first;
        blocks_.insert(blocks_.end(), kept.blocks_.begin(), kept.blocks_.end());
        pointers_.insert(pointers_.end(), kept.pointers_.begin(), kept.pointers_.end());
        kept.blocks_.clear();
    }
    if (blocks_.size() < needed) {
        // Half as many as it has of its own, at least: so that what a long timeline reads again and
        // again lies on large pages. Memory not yet touched costs nothing.
        grow(std::max(needed, blocks_.size() + (blocks_.size() - n_shared_) / 2));
    }
    for (auto i = static_cast<std::size_t>((begin + kv_block - 1) / kv_block); i < needed; ++i) {
        if (!blocks_[i]->was_written)
            blocks_[i]->clear(static_cast<std::size_t>(layout().block_bytes()));
    }
}

KvHead KvCache::head(std::int32_t layer, std::int32_t kv_head) const {
    const KvLayout& layout = pool_->layout();
    const std::int64_t offset = (layer * layout.n_kv_heads + kv_head) * layout.head_bytes();
    return {pointers_.data(), offset, layout.head_dim, layout.type};
}

KvCache KvCache::share(std::int32_t n_positions) {
    const auto whole = static_cast<std::size_t>(n_positions / kv_block);
    KvCache other(pool_);
    other.blocks_.reserve(whole + 1);
    other.pointers_.reserve(whole + 1);
    for (std::size_t i = 0; i < whole; ++i) {
        blocks_[i]->n_users.fetch_add(1, std::memory_order_relaxed);
        other.blocks_.push_back(blocks_[i]);
        other.pointers_.push_back(pointers_[i]);
    }
    if (n_positions % kv_block != 0) other.append_copy(pointers_[whole]);
    other.n_shared_ = whole;
    n_shared_ = std::max(n_shared_, whole);
    return other;
}

void KvCache::shrink(std::size_t n_blocks) {
    while (blocks_.size() > n_blocks) {
        pool_->release(blocks_.back());
        blocks_.pop_back();
        pointers_.pop_back();
    }
}

void KvCache::grow(std::size_t n_blocks) {
    pointers_.reserve(n_blocks);
    pool_->take(n_blocks - blocks_.size(), &blocks_);
    while (pointers_.size() < blocks_.size())
        pointers_.push_back(blocks_[pointers_.size()]->data);
}

void KvCache::append_copy(const std::uint8_t* data) {
    grow(blocks_.size() + 1);
    std::memcpy(pointers_.back(), data, static_cast<std::size_t>(pool_->layout().block_bytes()));
    blocks_.back()->was_written = true;
}

}  // namespace tinyllama

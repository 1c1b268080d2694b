#include "kv_cache.h"

#include <algorithm>
#include <cstring>

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

std::int64_t KvLayout::head_bytes() const {
    const std::int64_t width = (head_dim + 15) / 16 * 16;
    const std::int64_t elements = kv_block * (head_dim + width);
    switch (type) {
        case KvType::f32:
            return elements * 4;
        case KvType::bf16:
            return elements * 2;
        default:
            return elements + 2 * kv_block * static_cast<std::int64_t>(sizeof(float));
    }
}

void KvCache::reserve(std::int32_t begin, std::int32_t end) {
    const auto first = static_cast<std::size_t>(begin / kv_block);
    const auto needed = static_cast<std::size_t>((end + kv_block - 1) / kv_block);
    if (first < n_shared_) {
        // Of the block that begin cuts, the positions before it are wanted; of later ones, nothing.
        Block kept = begin % kv_block == 0 ? nullptr : copy_of(first);
        blocks_.resize(first);
        pointers_.resize(first);
        n_shared_ = first;
        if (kept != nullptr) append(std::move(kept));
    }
    if (blocks_.size() < needed) {
        // Half as many as there are, at least: so that what a long timeline reads again and again
        // lies on large pages. Memory not yet touched costs nothing.
        allocate(std::max(needed - blocks_.size(), blocks_.size() / 2));
    }
}

KvHead KvCache::head(std::int32_t layer, std::int32_t kv_head) const {
    const std::int64_t offset = (layer * layout_.n_kv_heads + kv_head) * layout_.head_bytes();
    return {pointers_.data(), offset, layout_.head_dim, layout_.type};
}

KvCache KvCache::share(std::int32_t n_positions) {
    const auto whole = static_cast<std::size_t>(n_positions / kv_block);
    KvCache other(layout_);
    for (std::size_t i = 0; i < whole; ++i)
        other.append(blocks_[i]);
    if (n_positions % kv_block != 0) other.append(copy_of(whole));
    other.n_shared_ = whole;
    n_shared_ = std::max(n_shared_, whole);
    return other;
}

void KvCache::append(Block block) {
    pointers_.push_back(block.get());
    blocks_.push_back(std::move(block));
}

void KvCache::allocate(std::size_t n_blocks) {
    const auto size = static_cast<std::size_t>(layout_.block_bytes());
    const auto memory = std::make_shared<AlignedBytes>(n_blocks * size);
    blocks_.reserve(blocks_.size() + n_blocks);
    pointers_.reserve(blocks_.capacity());
    for (std::size_t i = 0; i < n_blocks; ++i)
        append({memory, memory->data() + i * size});
}

KvCache::Block KvCache::copy_of(std::size_t block) const {
    const auto size = static_cast<std::size_t>(layout_.block_bytes());
    const auto memory = std::make_shared<AlignedBytes>(size);
    std::memcpy(memory->data(), blocks_[block].get(), size);
    return {memory, memory->data()};
}

}  // namespace tinyllama

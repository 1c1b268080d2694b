#include "memory.h"

#include <atomic>
#include <cstdlib>
#include <new>

namespace tinyllama {
namespace {

Allocator current;
std::atomic<std::size_t> n_in_use{0};

}  // namespace

bool set_allocator(const Allocator& allocator) {
    if (n_in_use.load() > 0) return false;
    current = allocator;
    return true;
}

void* allocate(std::size_t size, std::size_t alignment) noexcept {
    void* memory = nullptr;
    if (current.allocate != nullptr) {
        memory = current.allocate(size, alignment, current.user);
    } else if (size <= static_cast<std::size_t>(-1) - alignment) {
        // Whole multiples of the alignment, as C11 asks.
        memory = std::aligned_alloc(alignment, (size + alignment - 1) / alignment * alignment);
    }
    if (memory != nullptr) n_in_use.fetch_add(1);
    return memory;
}

void release(void* memory, std::size_t size, std::size_t alignment) noexcept {
    if (memory == nullptr) return;
    if (current.release != nullptr) {
        current.release(memory, size, alignment, current.user);
    } else {
        std::free(memory);
    }
    n_in_use.fetch_sub(1);
}

}  // namespace tinyllama

#include "memory.h"

#include <atomic>
#include <cstdlib>

namespace tinyllama {
namespace {

Allocator current;
std::atomic<std::size_t> n_in_use{0};

#ifdef _WIN32
void* aligned(std::size_t alignment, std::size_t size) { return _aligned_malloc(size, alignment); }
void free_aligned(void* memory) { _aligned_free(memory); }
#else
void* aligned(std::size_t alignment, std::size_t size) {
    return std::aligned_alloc(alignment, size);
}
void free_aligned(void* memory) { std::free(memory); }
#endif

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
        memory = aligned(alignment, (size + alignment - 1) / alignment * alignment);
    }
    if (memory != nullptr) n_in_use.fetch_add(1);
    return memory;
}

void release(void* memory, std::size_t size, std::size_t alignment) noexcept {
    if (memory == nullptr) return;
    if (current.release != nullptr) {
        current.release(memory, size, alignment, current.user);
    } else {
        free_aligned(memory);
    }
    n_in_use.fetch_sub(1);
}

}  // namespace tinyllama

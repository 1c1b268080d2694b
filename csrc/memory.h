// Where memory comes from: the system, or whoever a host names.
#pragma once

#include <cstddef>

namespace tinyllama {

struct Allocator {
    void* (*allocate)(std::size_t size, std::size_t alignment, void* user) = nullptr;
    void (*release)(void* memory, std::size_t size, std::size_t alignment, void* user) = nullptr;
    void* user = nullptr;
};

// For all memory from now on; without functions, the system's. False, and nothing changes, while
// memory of the one before is in use.
bool set_allocator(const Allocator& allocator);

// Null when there is none left. The alignment is a power of two.
void* allocate(std::size_t size, std::size_t alignment) noexcept;
void release(void* memory, std::size_t size, std::size_t alignment) noexcept;

}  // namespace tinyllama

// Vectors of numbers that kernels read and write.
#pragma once

#include <cstddef>
#include <new>
#include <vector>

namespace tinyllama {

// A vector whose memory begins with a cache line, so that loads of 64 bytes do not touch two.
template <typename T>
struct LineAllocator {
    using value_type = T;
    static constexpr std::align_val_t line{64};

    LineAllocator() = default;
    template <typename U>
    LineAllocator(const LineAllocator<U>&) {}

    T* allocate(std::size_t n) {
        if (n > static_cast<std::size_t>(-1) / sizeof(T)) throw std::bad_alloc();
        return static_cast<T*>(::operator new(n * sizeof(T), line));
    }
    void deallocate(T* memory, std::size_t) { ::operator delete(memory, line); }

    friend bool operator==(const LineAllocator&, const LineAllocator&) { return true; }
    friend bool operator!=(const LineAllocator&, const LineAllocator&) { return false; }
};
template <typename T>
using AlignedVector = std::vector<T, LineAllocator<T>>;

}  // namespace tinyllama

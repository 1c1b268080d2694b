// In the shared library operator new takes its memory where a host says. Nobody outside sees these.

#include <cstddef>
#include <new>

#include "memory.h"

namespace {

constexpr std::size_t header = alignof(std::max_align_t);  // in front of the memory: its size

void* take(std::size_t size, std::size_t alignment) {
    const std::size_t front = alignment > header ? alignment : header;
    auto* const memory =
        size + front < size ? nullptr
                            : static_cast<unsigned char*>(tinyllama::allocate(size + front, front));
    if (memory == nullptr) return nullptr;
    ::new (memory + front - sizeof(std::size_t)) std::size_t(size);
    return memory + front;
}

void give_back(void* pointer, std::size_t alignment) {
    if (pointer == nullptr) return;
    const std::size_t front = alignment > header ? alignment : header;
    auto* const memory = static_cast<unsigned char*>(pointer) - front;
    const std::size_t size =
        *reinterpret_cast<std::size_t*>(static_cast<unsigned char*>(pointer) - sizeof(std::size_t));
    tinyllama::release(memory, size + front, front);
}

void* take_or_throw(std::size_t size, std::size_t alignment) {
    void* const memory = take(size, alignment);
    if (memory == nullptr) throw std::bad_alloc();
    return memory;
}

constexpr auto usual = static_cast<std::align_val_t>(header);

std::size_t bytes(std::align_val_t alignment) { return static_cast<std::size_t>(alignment); }

}  // namespace

void* operator new(std::size_t n) { return take_or_throw(n, bytes(usual)); }
void* operator new[](std::size_t n) { return take_or_throw(n, bytes(usual)); }
void* operator new(std::size_t n, std::align_val_t a) { return take_or_throw(n, bytes(a)); }
void* operator new[](std::size_t n, std::align_val_t a) { return take_or_throw(n, bytes(a)); }
void* operator new(std::size_t n, const std::nothrow_t&) noexcept { return take(n, bytes(usual)); }
void* operator new[](std::size_t n, const std::nothrow_t&) noexcept {
    return take(n, bytes(usual));
}
void operator delete(void* p) noexcept { give_back(p, bytes(usual)); }
void operator delete[](void* p) noexcept { give_back(p, bytes(usual)); }
void operator delete(void* p, std::size_t) noexcept { give_back(p, bytes(usual)); }
void operator delete[](void* p, std::size_t) noexcept { give_back(p, bytes(usual)); }
void operator delete(void* p, std::align_val_t a) noexcept { give_back(p, bytes(a)); }
void operator delete[](void* p, std::align_val_t a) noexcept { give_back(p, bytes(a)); }
void operator delete(void* p, std::size_t, std::align_val_t a) noexcept { give_back(p, bytes(a)); }
void operator delete[](void* p, std::size_t, std::align_val_t a) noexcept {
    give_back(p, bytes(a));
}

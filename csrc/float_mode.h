// What a host may have switched on for itself, such as flushing subnormal numbers to zero, must not
// change what a model says.
#pragma once

#include <cstdint>

#ifdef __x86_64__
#include <xmmintrin.h>
#endif

namespace tinyllama {

// While it lives, this thread computes as IEEE 754 has it: rounding to nearest, subnormal numbers
// kept, no traps.
class FloatMode {
public:
#if defined(__x86_64__)
    FloatMode() : before_(_mm_getcsr()) {
        constexpr unsigned defaults = 0x1F80;
        if ((before_ & ~exceptions_seen) != defaults) _mm_setcsr(defaults);
    }
    ~FloatMode() {
        if ((_mm_getcsr() & ~exceptions_seen) != (before_ & ~exceptions_seen)) _mm_setcsr(before_);
    }

private:
    static constexpr unsigned exceptions_seen = 0x3F;
    unsigned before_;
#elif defined(__aarch64__)
    FloatMode() {
        __asm__ volatile("mrs %0, fpcr" : "=r"(before_));
        set(0);
    }
    ~FloatMode() { set(before_); }

private:
    static void set(std::uint64_t mode) { __asm__ volatile("msr fpcr, %0" : : "r"(mode)); }
    std::uint64_t before_;
#else
    FloatMode() {}
    ~FloatMode() {}
#endif

public:
    FloatMode(const FloatMode&) = delete;
    FloatMode& operator=(const FloatMode&) = delete;
};

}  // namespace tinyllama

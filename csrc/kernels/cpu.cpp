#include "cpu.h"

#include <string.h>

#ifdef __x86_64__
#include <cpuid.h>
#endif

namespace tinyllama {
namespace {

#ifdef __x86_64__

// What the operating system saves of the vector registers when it switches threads (XCR0).
uint64_t saved_state() {
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return static_cast<uint64_t>(high) << 32 | low;
}

bool has(uint32_t word, int bit) { return (word >> bit & 1) != 0; }

// The level of the vector instructions: 0 none of ours, 1 avx2, 2 avx512, 3 avx512vnni.
// Bits as in the Intel Software Developer's Manual, volume 2A, CPUID.
int x86_level() {
    uint32_t a, b, c, d;
    if (__get_cpuid(1, &a, &b, &c, &d) == 0) {
        return 0;
    }
    const bool fma = has(c, 12), osxsave = has(c, 27), f16c = has(c, 29);
    if (!fma || !osxsave || !f16c || __get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) {
        return 0;
    }
    const bool avx2 = has(b, 5);
    const bool avx512 = has(b, 16) && has(b, 17) && has(b, 30) && has(b, 31);  // F DQ BW VL
    const bool vnni = has(c, 11);
    const uint64_t ymm = 0x06, zmm = 0xe6;  // SSE and AVX; opmask and both halves of ZMM
    const uint64_t saved = saved_state();
    if (!avx2 || (saved & ymm) != ymm) {
        return 0;
    }
    if (!avx512 || (saved & zmm) != zmm) {
        return 1;
    }
    return vnni ? 3 : 2;
}

#endif

const int max_sets = 4;

struct Supported {
    const KernelTable* tables[max_sets + 1] = {};
    const char* names[max_sets + 1] = {};

    Supported() {
        int n = 0;
#ifdef __x86_64__
        const KernelTable* const by_level[] = {&kernels_avx2, &kernels_avx512, &kernels_avx512vnni};
        for (int level = x86_level(); level > 0; --level) {
            tables[n++] = by_level[level - 1];
        }
#endif
        tables[n++] = &kernels_generic;
        for (int i = 0; i < n; ++i) {
            names[i] = tables[i]->name;
        }
    }
};

const Supported& supported() {
    static const Supported sets;
    return sets;
}

}  // namespace

const char* const* supported_isas() { return supported().names; }

const KernelTable* find_kernels(const char* name) {
    const KernelTable* const* table = supported().tables;
    if (name == nullptr || strcmp(name, "auto") == 0) {
        return *table;
    }
    while (*table != nullptr && strcmp((*table)->name, name) != 0) {
        ++table;
    }
    return *table;
}

}  // namespace tinyllama

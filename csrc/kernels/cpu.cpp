#include "cpu.h"

#include <string.h>

#ifdef __x86_64__
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif
#if defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
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

// Linux gives a process the tile registers when it asks for them, once for all its threads.
bool ask_for_tiles() {
#ifdef __linux__
    const long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return false;
#endif
}

struct Features {
    bool avx2 = false, avxvnni = false, avx512 = false, avx512vnni = false, amx = false;
};

// Bits as in the Intel Software Developer's Manual, volume 2A, CPUID. Each set has all that the
// one before it needs, except that AVX-512 does not need AVX-VNNI.
Features detect() {
    Features f;
    uint32_t a, b, c, d, a1, b1, c1, d1;
    if (__get_cpuid(1, &a, &b, &c, &d) == 0) {
        return f;
    }
    const bool fma = has(c, 12), osxsave = has(c, 27), f16c = has(c, 29);
    if (!fma || !osxsave || !f16c || __get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) {
        return f;
    }
    const uint64_t ymm = 0x06, zmm = 0xe6;  // SSE and AVX; opmask and both halves of ZMM
    const uint64_t tiles = 3u << 17;        // their configuration and their data
    const uint64_t saved = saved_state();
    f.avx2 = has(b, 5) && (saved & ymm) == ymm;
    if (a < 1 || __get_cpuid_count(7, 1, &a1, &b1, &c1, &d1) == 0) {
        a1 = 0;
    }
    f.avxvnni = f.avx2 && has(a1, 4);
    f.avx512 = f.avx2 && (saved & zmm) == zmm &&  // and F, DQ, BW, VL:
               has(b, 16) && has(b, 17) && has(b, 30) && has(b, 31);
    f.avx512vnni = f.avx512 && has(c, 11);
    const bool amx = has(a1, 5) &&  // AVX-512 BF16, and of AMX bf16, tile, int8:
                     has(d, 22) && has(d, 24) && has(d, 25);
    f.amx = f.avx512vnni && amx && (saved & tiles) == tiles && ask_for_tiles();
    return f;
}

#endif

#ifdef __aarch64__

// FEAT_DotProd of the Arm architecture, as the operating system tells of it.
bool has_dot_product() {
#if defined(__linux__)
    const unsigned long hwcap_asimddp = 1ul << 20;
    return (getauxval(AT_HWCAP) & hwcap_asimddp) != 0;
#elif defined(__APPLE__)
    int value = 0;
    size_t size = sizeof(value);
    return sysctlbyname("hw.optional.arm.FEAT_DotProd", &value, &size, nullptr, 0) == 0 &&
           value != 0;
#else
    return false;
#endif
}

#endif

const int max_sets = 6;

struct Supported {
    const KernelTable* tables[max_sets + 1] = {};
    const char* names[max_sets + 1] = {};

    Supported() {
        int n = 0;
        const auto offer = [&](const KernelTable& kernels, bool can_run) {
            if (!can_run) return;
            tables[n] = &kernels;
            names[n++] = kernels.name;
        };
#ifdef __x86_64__
        const Features f = detect();
#ifndef TINYLLAMA_WITHOUT_AMX
        offer(kernels_avx512amx, f.amx);
#endif
        offer(kernels_avx512vnni, f.avx512vnni);
        offer(kernels_avx512, f.avx512);
#ifndef TINYLLAMA_WITHOUT_AVXVNNI
        offer(kernels_avxvnni, f.avxvnni);
#endif
        offer(kernels_avx2, f.avx2);
#endif
#ifdef __aarch64__
        offer(kernels_neondotprod, has_dot_product());
        offer(kernels_neon, true);
#endif
        offer(kernels_generic, true);
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

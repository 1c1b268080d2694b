// What this machine can do: reading memory, multiplying matrices. Built by ceiling.py.
//
//   probe read BYTES       GB/s: each thread reads its share of a buffer of BYTES, over and over
//   probe f32|bf16|int8    Gop/s (a multiply and an add are two) of the fastest unit for it
//
// Threads: OMP_NUM_THREADS. Each prints the best and the median of some short runs.
#define _GNU_SOURCE
#include <omp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

typedef uint64_t Words __attribute__((vector_size(64)));
#if defined(__AVX512F__)
enum { width = 64 };
#elif defined(__AVX__)
enum { width = 32 };
#else
enum { width = 16 };
#endif
typedef float Floats __attribute__((vector_size(width)));
enum { n_runs = 15 };

static void keep(const void* p) { __asm__ volatile("" : : "r"(p) : "memory"); }

static void read_all(const Words* data, long n) {
    Words a = {0}, b = {0}, c = {0}, d = {0};
    for (long i = 0; i + 4 <= n; i += 4) {
        a |= data[i], b |= data[i + 1], c |= data[i + 2], d |= data[i + 3];
    }
    a |= b | c | d;
    keep(&a);
}

// The loops below return operations done per call. Accumulators fill the registers, so that the
// unit waits for nothing.
static double f32_block(void) {
    Floats acc[12], x, w;
    memset(acc, 0, sizeof acc), memset(&x, 1, sizeof x), memset(&w, 1, sizeof w);
    keep(acc), keep(&x), keep(&w);  // as if unknown: nothing is computed beforehand
    for (int i = 0; i < 4096; ++i) {
        __asm__ volatile("" : "+r"(i));
        for (int j = 0; j < 12; ++j) acc[j] += x * w;
    }
    keep(acc);
    return 4096.0 * 12 * (width / 4) * 2;
}

#if defined(__AMX_INT8__) && defined(__AMX_BF16__)
static void configure_tiles(void) {
    static const int permission = 18, request = 0x1023;  // XFEATURE_XTILEDATA, ARCH_REQ_XCOMP_PERM
    syscall(SYS_arch_prctl, request, permission);
    volatile uint8_t tiles[64] = {1};  // volatile: gcc 12 does not know that all 64 bytes are read
    for (int t = 0; t < 8; ++t) tiles[16 + 2 * t] = 64, tiles[48 + t] = 16;
    _tile_loadconfig((const void*)tiles);
}

// Four products of 16 x 16 from four tiles loaded before each: what a matrix product needs.
#define TILE_BLOCK(name, multiply, depth)                                     \
    static double name(void) {                                                \
        static _Thread_local int8_t a[4][1024] __attribute__((aligned(64)));  \
        configure_tiles();                                                    \
        _tile_zero(0);                                                        \
        _tile_zero(1);                                                        \
        _tile_zero(2);                                                        \
        _tile_zero(3);                                                        \
        for (int i = 0; i < 2048; ++i) {                                      \
            _tile_loadd(4, a[0], 64);                                         \
            _tile_loadd(5, a[1], 64);                                         \
            _tile_loadd(6, a[2], 64);                                         \
            _tile_loadd(7, a[3], 64);                                         \
            multiply(0, 4, 6);                                                \
            multiply(1, 4, 7);                                                \
            multiply(2, 5, 6);                                                \
            multiply(3, 5, 7);                                                \
        }                                                                     \
        _tile_stored(0, a[0], 64);                                            \
        keep(a);                                                              \
        _tile_release();                                                      \
        return 2048.0 * 4 * 16 * 16 * (depth) * 2;                            \
    }
TILE_BLOCK(int8_block, _tile_dpbssd, 64)
TILE_BLOCK(bf16_block, _tile_dpbf16ps, 32)
static const char* const int8_unit = "AMX int8";
static const char* const bf16_unit = "AMX bf16";
#else
static double bf16_block(void) { return f32_block(); }
static const char* const bf16_unit = "f32 FMA";
#if defined(__AVX512VNNI__)
static double int8_block(void) {
    __m512i acc[12], x = _mm512_set1_epi8(1);
    memset(acc, 0, sizeof acc);
    keep(acc);
    for (int i = 0; i < 4096; ++i) {
        __asm__ volatile("" : "+r"(i));
        for (int j = 0; j < 12; ++j) acc[j] = _mm512_dpbusd_epi32(acc[j], x, x);
    }
    keep(acc);
    return 4096.0 * 12 * 64 * 2;
}
static const char* const int8_unit = "AVX-512 VNNI";
#else
static double int8_block(void) { return f32_block(); }
static const char* const int8_unit = "f32 FMA";
#endif
#endif

static int compare(const void* a, const void* b) {
    const double x = *(const double*)a, y = *(const double*)b;
    return (x > y) - (x < y);
}

static const double* measure(long n_bytes, double (*block)(void)) {
    static double rates[n_runs];
    const int n_threads = omp_get_max_threads();
    const long n = n_bytes / 64 / n_threads;
    double work = 0, begin = 0, end = 0;
#pragma omp parallel
    {
        Words* mine = NULL;
        long n_times = 1;
        if (!block) {  // first touched by its reader; 64 MB or more per run
            mine = aligned_alloc(4096, (n * 64 + 4095) / 4096 * 4096);
            memset(mine, 1, n * 64);
            n_times = 1 + (64L << 20) / (n * 64 * n_threads);
        }
        for (int run = -1; run < n_runs; ++run) {
            double done = 0;
#pragma omp barrier
#pragma omp master
            work = 0, begin = omp_get_wtime();
#pragma omp barrier
            if (block) {
                while (omp_get_wtime() - begin < 0.02) done += block();
            } else {
                for (long i = 0; i < n_times; ++i) read_all(mine, n), done += n * 64.0;
            }
#pragma omp atomic
            work += done;
#pragma omp barrier
#pragma omp master
            {
                end = omp_get_wtime();
                if (run >= 0) rates[run] = work / (end - begin) / 1e9;
            }
#pragma omp barrier
        }
        free(mine);
    }
    qsort(rates, n_runs, sizeof rates[0], compare);
    return rates;
}

int main(int argc, char** argv) {
    const char* what = argc > 1 ? argv[1] : "";
    const char* unit = "read";
    const double* rates;
    if (!strcmp(what, "read") && argc > 2) {
        rates = measure(atol(argv[2]), NULL);
    } else if (!strcmp(what, "f32")) {
        unit = "f32 FMA", rates = measure(0, f32_block);
    } else if (!strcmp(what, "bf16")) {
        unit = bf16_unit, rates = measure(0, bf16_block);
    } else if (!strcmp(what, "int8")) {
        unit = int8_unit, rates = measure(0, int8_block);
    } else {
        fprintf(stderr, "usage: probe read BYTES | f32 | bf16 | int8\n");
        return 2;
    }
    printf("{\"unit\": \"%s\", \"median\": %.1f, \"best\": %.1f}\n", unit, rates[n_runs / 2],
           rates[n_runs - 1]);
    return 0;
}

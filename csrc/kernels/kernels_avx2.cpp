// Kernels for AVX2 with FMA and F16C. Compile with
//   -O3 -ffp-contract=off -mavx2 -mfma -mf16c
#include "kernel_table.h"

#ifdef __x86_64__
#include <immintrin.h>

namespace tinyllama {
namespace {

#include "kernels_plain.inc"

using Vec = __m256;
constexpr int lanes = 8;

Vec splat(float x) { return _mm256_set1_ps(x); }
Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
Vec fnma(Vec a, Vec b, Vec c) { return _mm256_fnmadd_ps(a, b, c); }
Vec round(Vec x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

Vec power_of_two(__m256i n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}

// In two factors, each within the range of normal numbers; only the last product rounds.
Vec scale_by_power(Vec v, Vec n) {
    const __m256i whole = _mm256_cvtps_epi32(n);
    const __m256i half = _mm256_srai_epi32(whole, 1);
    return mul(mul(v, power_of_two(half)), power_of_two(_mm256_sub_epi32(whole, half)));
}

__m256i first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

Vec load(const float* p) { return _mm256_loadu_ps(p); }
Vec load_part(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
void store_part(float* p, Vec v, int n) { _mm256_maskstore_ps(p, first(n), v); }

Vec load(const uint16_t* p) {
    const __m128i bf16 = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bf16), 16));
}
Vec load_part(const uint16_t* p, int n) {
    uint16_t padded[lanes] = {};
    for (int i = 0; i < n; ++i) {
        padded[i] = p[i];
    }
    return load(padded);
}

__m128 quarter(Vec v) { return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)); }

Vec mac(Vec sum, Vec w, Vec x) { return fma(w, x, sum); }

struct BytesQ8 {
    __m256i q;
    Vec scale;
};

__m256i load_bytes(const int8_t* q) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q));
}
BytesQ8 load(const BlockQ8_0* b) {
    const __m128i scale = _mm_set1_epi16(static_cast<int16_t>(b->scale));
    return {load_bytes(b->q), _mm256_cvtph_ps(scale)};
}
BytesQ8 load(const ActQ8* a) { return {load_bytes(a->q), splat(a->scale)}; }

// |w| times x with the sign of w. No sum of two saturates: 2 * 128 * 127 < 2^15. The sums are
// below 2^24, so their conversion is exact.
Vec mac(Vec sum, const BytesQ8& w, const BytesQ8& x) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w.q), _mm256_sign_epi8(x.q, w.q));
    const __m256i fours = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    return fma(mul(w.scale, x.scale), _mm256_cvtepi32_ps(fours), sum);
}

template <typename W>
struct Block {
    static constexpr int tokens = 3, step = lanes;
};
template <>
struct Block<BlockQ8_0> {
    static constexpr int tokens = 3, step = 1;
};

void quantize_q8(ActQ8* out, const float* x, int64_t n) {
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    for (int64_t b = 0; b < n / 32; ++b, x += 32) {
        __m256i top = _mm256_setzero_si256();
        for (int i = 0; i < 32; i += lanes) {
            const __m256i bits = _mm256_castps_si256(load(x + i));
            top = _mm256_max_epi32(top, _mm256_and_si256(bits, magnitude));
        }
        int32_t tops[lanes];
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(tops), top);
        int32_t largest_bits = 0;
        for (int i = 0; i < lanes; ++i) {
            largest_bits = tops[i] > largest_bits ? tops[i] : largest_bits;
        }
        float inverse;
        ActQ8 block = {};
        block.scale = q8_scale(largest_bits, &inverse);
        if (inverse != 0.0f) {
            __m256i q[4];
            for (int i = 0; i < 4; ++i) {
                q[i] = _mm256_cvtps_epi32(mul(load(x + i * lanes), splat(inverse)));
            }
            // Packing works in 128-bit halves: it leaves groups of four in the order 0 2 4 6 1 3
            // 5 7.
            const __m256i packed =
                _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
            _mm256_storeu_si256(
                reinterpret_cast<__m256i*>(block.q),
                _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
        }
        out[b] = block;
    }
}

#include "kernels_x86.inc"

}  // namespace

const KernelTable kernels_avx2 = x86_table("avx2");

}  // namespace tinyllama
#endif

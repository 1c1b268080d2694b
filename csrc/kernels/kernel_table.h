// One table of functions per instruction set. Kernels work on ranges of rows, know nothing of
// threads, allocate nothing and include no C++ standard header with inline functions (a weak
// symbol compiled here with AVX flags could replace the portable one in the whole program).
//
// The promise every kernel keeps: an output element depends on its own inputs alone. How many
// tokens are computed in one call, and which range of rows, never changes a bit of it.
#pragma once

#include <stdint.h>

namespace tinyllama {

// 32 weights with one scale: w[i] = f16(scale) * q[i]. The layout of GGUF's q8_0.
struct BlockQ8_0 {
    uint16_t scale;
    int8_t q[32];
};
static_assert(sizeof(BlockQ8_0) == 34, "GGUF q8_0 block");

// 32 activations with one scale, made by quantize_q8: x[i] ~ scale * q[i], -127 <= q <= 127.
struct ActQ8 {
    float scale;
    int8_t q[32];
};
static_assert(sizeof(ActQ8) == 36, "activation block");

struct KernelTable {
    const char* name;

    // y[t * y_stride + r] = sum over c of w[r][c] * x[t][c], for r in [begin, end), t in
    // [0, n_tokens). Weights are row-major and need no alignment; strides count elements.
    void (*matmul_f32)(float* y, int64_t y_stride, const float* w, int64_t cols, const float* x,
                       int64_t x_stride, int64_t n_tokens, int64_t begin, int64_t end);
    void (*matmul_bf16)(float* y, int64_t y_stride, const uint16_t* w, int64_t cols, const float* x,
                        int64_t x_stride, int64_t n_tokens, int64_t begin, int64_t end);
    // cols is a multiple of 32; x_stride counts blocks.
    void (*matmul_q8_0)(float* y, int64_t y_stride, const BlockQ8_0* w, int64_t cols,
                        const ActQ8* x, int64_t x_stride, int64_t n_tokens, int64_t begin,
                        int64_t end);
    // n is a multiple of 32; per block of 32: scale = max|x| / 127, q = round to nearest even.
    void (*quantize_q8)(ActQ8* out, const float* x, int64_t n);

    // out = x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich, arXiv 1910.07467)
    void (*rms_norm)(float* out, const float* x, const float* weight, int64_t n, float eps);
    // Rotates the pairs (2i, 2i+1) of n_heads heads in place; cos and sin have head_dim / 2 values.
    void (*rope)(float* x, const float* cos, const float* sin, int64_t n_heads, int64_t head_dim);
    // out = silu(gate) * up (Shazeer, arXiv 2002.05202); out may be gate.
    void (*swiglu)(float* out, const float* gate, const float* up, int64_t n);
    // x += y
    void (*add)(float* x, const float* y, int64_t n);
    // One query head over n_positions of the cache: out = softmax(q . k / sqrt(head_dim)) v.
    // k and v point at this head's vector of position 0; kv_stride is the step to the next
    // position; scores is scratch for n_positions floats.
    void (*attend)(float* out, const float* q, const float* k, const float* v, int64_t kv_stride,
                   int64_t n_positions, int64_t head_dim, float* scores);
};

// The sets that are compiled in, each defined by the file of its name.
extern const KernelTable kernels_generic;
#ifdef __x86_64__
extern const KernelTable kernels_avx2;
extern const KernelTable kernels_avx512;
extern const KernelTable kernels_avx512vnni;
#endif

}  // namespace tinyllama

// The kernels in plain C++: the meaning of all the other sets.
//
// Compile with -O3 -ffp-contract=off and no instruction-set flags. Sums run in 8 interleaved
// partial sums so that a compiler may use vectors without reordering anything.
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "kernel_table.h"

namespace tinyllama {
namespace {

#include "kernels_plain.inc"

float widen(float value) { return value; }

// bfloat16 is the upper half of a float.
float widen(uint16_t bf16) {
    const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

float widen_f16(uint16_t f16) {
    const uint32_t exponent = (f16 >> 10) & 31;
    const uint32_t mantissa = f16 & 1023;
    float magnitude;
    if (exponent == 0) {  // zero and subnormal: a multiple of 2^-24
        magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    } else {
        const uint32_t wide = exponent == 31 ? 255 : exponent + 112;
        const uint32_t bits = wide << 23 | mantissa << 13;
        memcpy(&magnitude, &bits, sizeof(magnitude));
    }
    return (f16 & 0x8000) != 0 ? -magnitude : magnitude;
}

template <typename W>
float dot(const W* w, const float* x, int64_t n) {
    float sum[8] = {};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        for (int64_t k = 0; k < 8; ++k) {
            sum[k] += widen(w[i + k]) * x[i + k];
        }
    }
    for (int64_t k = 0; i + k < n; ++k) {
        sum[k] += widen(w[i + k]) * x[i + k];
    }
    return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
}

float dot(const BlockQ8_0* w, const ActQ8* x, int64_t n_blocks) {
    float sum = 0.0f;
    for (int64_t b = 0; b < n_blocks; ++b) {
        int32_t block_sum = 0;
        for (int i = 0; i < 32; ++i) {
            block_sum += w[b].q[i] * x[b].q[i];
        }
        sum += widen_f16(w[b].scale) * x[b].scale * static_cast<float>(block_sum);
    }
    return sum;
}

// `n` counts the elements of a row: values, or blocks of 32.
template <typename W, typename X>
void matmul(float* y, int64_t y_stride, const W* w, int64_t n, const X* x, int64_t x_stride,
            int64_t n_tokens, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
        for (int64_t t = 0; t < n_tokens; ++t) {
            y[t * y_stride + r] = dot(w + r * n, x + t * x_stride, n);
        }
    }
}

void matmul_f32(float* y, int64_t y_stride, const float* w, int64_t cols, const float* x,
                int64_t x_stride, int64_t n_tokens, int64_t begin, int64_t end) {
    matmul(y, y_stride, w, cols, x, x_stride, n_tokens, begin, end);
}

void matmul_bf16(float* y, int64_t y_stride, const uint16_t* w, int64_t cols, const float* x,
                 int64_t x_stride, int64_t n_tokens, int64_t begin, int64_t end) {
    matmul(y, y_stride, w, cols, x, x_stride, n_tokens, begin, end);
}

void matmul_q8_0(float* y, int64_t y_stride, const BlockQ8_0* w, int64_t cols, const ActQ8* x,
                 int64_t x_stride, int64_t n_tokens, int64_t begin, int64_t end) {
    matmul(y, y_stride, w, cols / 32, x, x_stride, n_tokens, begin, end);
}

void quantize_q8(ActQ8* out, const float* x, int64_t n) {
    for (int64_t b = 0; b < n / 32; ++b, x += 32) {
        int32_t largest = 0;
        for (int i = 0; i < 32; ++i) {
            const float magnitude = fabsf(x[i]);
            int32_t bits;
            memcpy(&bits, &magnitude, sizeof(bits));
            largest = bits > largest ? bits : largest;
        }
        float inverse;
        ActQ8 block = {};
        block.scale = q8_scale(largest, &inverse);
        for (int i = 0; i < 32 && inverse != 0.0f; ++i) {
            block.q[i] = static_cast<int8_t>(rintf(x[i] * inverse));
        }
        out[b] = block;
    }
}

void swiglu(float* out, const float* gate, const float* up, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        out[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
    }
}

void attend(float* out, const float* q, const float* k, const float* v, int64_t kv_stride,
            int64_t n_positions, int64_t head_dim, float* scores) {
    float largest = -INFINITY;
    for (int64_t pos = 0; pos < n_positions; ++pos) {
        scores[pos] = dot(k + pos * kv_stride, q, head_dim);
        largest = scores[pos] > largest ? scores[pos] : largest;
    }
    const float scale = 1.0f / sqrtf(static_cast<float>(head_dim));
    float total = 0.0f;
    memset(out, 0, static_cast<size_t>(head_dim) * sizeof(float));
    for (int64_t pos = 0; pos < n_positions; ++pos) {
        const float weight = expf((scores[pos] - largest) * scale);
        total += weight;
        for (int64_t i = 0; i < head_dim; ++i) {
            out[i] += weight * v[pos * kv_stride + i];
        }
    }
    for (int64_t i = 0; i < head_dim; ++i) {
        out[i] /= total;
    }
}

}  // namespace

const KernelTable kernels_generic = {
    "generic", matmul_f32, matmul_bf16, matmul_q8_0, quantize_q8,
    rms_norm,  rope,       swiglu,      add,         attend,
};

}  // namespace tinyllama

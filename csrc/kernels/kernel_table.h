// One table of functions per instruction set. Kernels work on ranges of panels or rows, know
// nothing of threads, allocate nothing and include no C++ standard header with inline functions (a
// weak symbol compiled here with AVX flags could replace the portable one in the whole program).
//
// Matrices come as panels of 16 rows (packing.h): one vector holds the same column of 16 rows, so
// a kernel computes 16 outputs side by side, each in its own lane, and never sums across a vector.
//
// The promise every kernel keeps: an output element depends on its own inputs alone, and its sum
// has the one order that is written here. How many tokens are computed in one call, and which range
// of panels, never changes a bit of it.
#pragma once

#include <stdint.h>

namespace tinyllama {

constexpr int64_t panel_rows = 16;
constexpr int64_t block_size = 32;    // columns that share a scale in files of q8_0 and q4_0
constexpr int64_t group_size = 1024;  // columns that share a scale in activations and packed q8_0
constexpr int64_t weigh_block = 64;   // logits whose largest is known, and whose weights are summed

// Bytes that kernels may read, and multiply by zero, beyond the last panel.
constexpr int64_t panels_slack = 512;

// A packed matrix (rows, cols). Panel p holds rows 16 p to 16 p + 15, rows beyond the last are
// zero; it begins at data + p * panel_bytes, 64-byte aligned. Within a panel:
//   f32   float w[cols][16]
//   bf16  uint16 w[padded / 2][16][2], padded = cols rounded up to 32, zeros there
//   q8_0  float scale[groups of 1,024 columns][16], then int8 q[cols / 4][16][4]: column 4 i + j,
//         row r at [i][r][j], from -127 to 127. The file's blocks of 32 have become groups of up to
//         1,024 (regroup_q8_0): so the products of a whole group are one exact integer.
//   q4_0  n = cols / 32 blocks: f16 scale[n][16], filled up to 64 bytes, then
//         uint8 q[n][4][16][4]: the low half of a byte is column 4 i + j of the block, the high
//         half column 16 + 4 i + j, each 0 to 15 and 8 more than the weight / scale
struct Panels {
    const uint8_t* data;
    int64_t panel_bytes;
    int64_t rows;
    int64_t cols;
};

constexpr int64_t n_groups(int64_t cols) { return (cols + group_size - 1) / group_size; }

constexpr int64_t q4_scales_bytes(int64_t cols) { return (cols + 63) / 64 * 64; }

// Activations for q8_0 and q4_0: row t has int8 at q + t * stride (stride: cols rounded up to 64,
// zeros beyond cols), for each group of 1,024 a scale, x ~ scale * q, and for each block of 32 the
// sum of its q. Rows of scales and sums follow each other without gaps.
struct ActsQ8 {
    const int8_t* q;
    const float* scales;
    const int32_t* sums;
    int64_t stride;
};

// Activations for matmul_q24: x ~ scale * (d[0] + d[1] / 2^8 + d[2] / 2^16), with int8 d[k] of row
// t at digits + (3 t + k) * stride (stride: cols rounded up to 64, zeros beyond cols), and a scale
// for each group of 1,024. Rows of scales follow each other without gaps.
struct ActsQ24 {
    const int8_t* digits;
    const float* scales;
    int64_t stride;
};

// Where the products go: y[t * stride + r] = result, or += result.
struct Output {
    float* y;
    int64_t stride;
    bool add;
};

// Keys and values of 32 positions, of one layer and all its key heads, lie in one block of memory;
// a timeline has a list of them. A head's part begins `offset` bytes into each, 64-byte aligned,
// and holds, with width = head_dim, which is even, rounded up to 16:
//   f32   float key[2][head_dim][16], of 16 positions each; float value[32][width]
//   bf16  uint16 key[2][head_dim / 2][16][2], value[16][width][2]
//   int8  float key_scale[32], value_scale[32]; int8 key[2][n][16][4], n = head_dim / 4 rounded up,
//         value[8][width][4]
// Two or four elements of a key, or positions of a value, lie together, as AMX multiplies them.
// Zeros are beyond head_dim.
constexpr int64_t kv_block = 32;
enum class KvType : uint8_t { f32, bf16, int8 };

// Columns of a key, elements of a value, and bytes of a head's part as they are stored.
constexpr int64_t kv_columns(KvType type, int64_t head_dim) {
    return type == KvType::int8 ? (head_dim + 3) / 4 * 4 : head_dim;
}
constexpr int64_t kv_width(int64_t head_dim) { return (head_dim + 15) / 16 * 16; }
constexpr int64_t kv_scales_bytes = 2 * kv_block * 4;
constexpr int64_t kv_part_bytes(KvType type, int64_t head_dim) {
    const int64_t elements = kv_block * (kv_columns(type, head_dim) + kv_width(head_dim));
    return type == KvType::f32    ? elements * 4
           : type == KvType::bf16 ? elements * 2
                                  : elements + kv_scales_bytes;
}

struct KvHead {
    uint8_t* const* blocks;  // block i holds positions [32 i, 32 i + 32)
    int64_t offset;
    int64_t head_dim;
    KvType type;
};

struct KernelTable {
    const char* name;

    // Outputs of panels [begin, end) for n_tokens tokens; rows beyond the last are not written.
    // f32: acc = fma(w, x, acc) over the columns in order, from 0. x row t at x + t * x_stride.
    void (*matmul_f32)(const Output& y, const Panels& w, const float* x, int64_t x_stride,
                       int64_t n_tokens, int64_t begin, int64_t end);
    // bf16: for each 32 columns in order, e = fma(w, x, e) over the 16 even ones from 0, o over the
    // odd ones, acc = acc + (e + o), all with subnormals as zero: the sum that AMX's TDPBF16PS
    // makes (Intel SDM 2). x is bf16 too, padded with zeros to whole 32; x_stride counts elements.
    void (*matmul_bf16)(const Output& y, const Panels& w, const uint16_t* x, int64_t x_stride,
                        int64_t n_tokens, int64_t begin, int64_t end);
    // q8_0: for each group in order, acc = fma(float(sum of the integer products),
    // w scale * x scale, acc), from 0. q4_0: for each group in order, acc = fma(part, x scale,
    // acc), where for each of its blocks in order part = fma(float(sum), w scale, part), from 0.
    void (*matmul_q8_0)(const Output& y, const Panels& w, const ActsQ8& x, int64_t n_tokens,
                        int64_t begin, int64_t end);
    void (*matmul_q4_0)(const Output& y, const Panels& w, const ActsQ8& x, int64_t n_tokens,
                        int64_t begin, int64_t end);

    // A row of activations, n a multiple of 32: scale = max|x| / 127, q = round to nearest even,
    // and zeros up to the next multiple of 64.
    void (*quantize_q8)(int8_t* q, float* scales, int32_t* sums, const float* x, int64_t n);
    // A row of weights as the file has them, blocks of an f16 scale and 32 int8: likewise, without
    // the zeros.
    void (*regroup_q8_0)(int8_t* q, float* scales, const uint8_t* blocks, int64_t cols);
    // Rounds to nearest even; out is filled with zeros up to the next multiple of 32.
    void (*round_bf16)(uint16_t* out, const float* x, int64_t n);

    // out = x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich, arXiv 1910.07467)
    void (*rms_norm)(float* out, const float* x, const float* weight, int64_t n, float eps);
    // Rotates the pairs (2i, 2i+1) of n_heads heads in place. For each element of a head, cos has
    // its pair's cosine, and sin its sine, with a minus for the first of the two.
    void (*rope)(float* x, const float* cos, const float* sin, int64_t n_heads, int64_t head_dim);
    // out = silu(gate) * up (Shazeer, arXiv 2002.05202); out may be gate.
    void (*swiglu)(float* out, const float* gate, const float* up, int64_t n);

    // Copies n logits; maxima[i] = the largest of each 64 of them, unless it is null. Returns the
    // bits of the largest magnitude: from 0x7f800000 on, one of them is no finite number.
    int32_t (*hand_out)(float* to, float* maxima, const float* from, int64_t n);
    // Softmax of n_blocks blocks of 64, not normalised: weights = 2^((x - best) * scale) for x up
    // to best, to about 2e-7 of it, and 0 for x - best < -125 / scale; sums are of each block: lane
    // i of 16 adds elements i, i + 16, i + 32, i + 48, then lane i with i + 8, i + 4, i + 2, i + 1.
    void (*weigh)(float* weights, float* sums, const float* x, int64_t n_blocks, float best,
                  float scale);

    // Writes a position's key and value (head_dim each); int8 with the scale max|.| / 127 of each.
    void (*store_kv)(const KvHead& head, int64_t pos, const float* k, const float* v);
    // out[i] = softmax(q[i] . key / sqrt(head_dim)) value over positions [0, n_positions[i]), for
    // n_queries queries of one key head, in spans of 128 positions with a running maximum (Milakov
    // and Gimelshein, arXiv 1805.02867): a query's sums depend on its own positions alone. Their
    // order stands in attention.inc.
    void (*attend)(float* const* out, const float* const* q, const int32_t* n_positions,
                   int64_t n_queries, const KvHead& head);

    // Panels of f32 as whole numbers of 24 bits, as the activations are: for each group in order
    // y = or += (a + (b + c / 2^8) / 2^8) * w scale * x scale, and += for later groups, where a, b
    // and c are the integer sums of d[0] d[0], of d[0] d[1] + d[1] d[0], and of d[0] d[2] + d[1]
    // d[1] + d[2] d[0]. About as exact as matmul_f32 where no value of a group is far larger than
    // the rest, with other bits. Weights are finite, and below 1e33. Null where matmul_f32 is
    // faster.
    void (*matmul_q24)(const Output& y, const Panels& w, const ActsQ24& x, int64_t n_tokens,
                       int64_t begin, int64_t end) = nullptr;
    // A row of activations: scale = max|x| / 127, and the digits of 2^16 x / scale, rounded to
    // nearest even. Null as above.
    void (*quantize_q24)(int8_t* digits, float* scales, const float* x, int64_t n) = nullptr;
};

// The sets that are compiled in, each defined by the file of its name.
extern const KernelTable kernels_generic;
#ifdef __x86_64__
extern const KernelTable kernels_avx2;
extern const KernelTable kernels_avxvnni;
extern const KernelTable kernels_avx512;
extern const KernelTable kernels_avx512vnni;
extern const KernelTable kernels_avx512amx;
#endif
#ifdef __aarch64__
extern const KernelTable kernels_neon;
extern const KernelTable kernels_neondotprod;
#endif

}  // namespace tinyllama

#include "packing.h"

#include <algorithm>
#include <cstring>

namespace tinyllama {
namespace {

// Whatever the format, a panel's columns are words of 32 bits: a float, two bf16, four bytes or
// eight nibbles. Word i of row r lies at [i][r], so that packing is transposition.
constexpr std::int64_t word_bytes = 4;
constexpr std::int64_t line_bytes = panel_rows * word_bytes;

using Words = std::uint32_t __attribute__((vector_size(16)));

// Four words of four rows. A row that is null is zero, here and below.
inline void transpose_4x4(const std::uint8_t* const* rows, std::int64_t word, std::uint8_t* out) {
    Words r[4] = {};
    for (int i = 0; i < 4; ++i) {
        if (rows[i] != nullptr) std::memcpy(&r[i], rows[i] + word * word_bytes, sizeof(r[i]));
    }
    // Compilers make shuffles of these.
    const Words columns[4] = {{r[0][0], r[1][0], r[2][0], r[3][0]},
                              {r[0][1], r[1][1], r[2][1], r[3][1]},
                              {r[0][2], r[1][2], r[2][2], r[3][2]},
                              {r[0][3], r[1][3], r[2][3], r[3][3]}};
    for (int i = 0; i < 4; ++i) {
        std::memcpy(out + (word + i) * line_bytes, &columns[i], sizeof(columns[i]));
    }
}

void copy_word(std::uint8_t* out, const std::uint8_t* row, std::int64_t at) {
    std::memset(out, 0, word_bytes);
    if (row != nullptr) std::memcpy(out, row + at, word_bytes);
}

// `n_words` words of 16 rows.
void transpose(const std::uint8_t* const (&rows)[panel_rows], std::int64_t n_words,
               std::uint8_t* out) {
    std::int64_t word = 0;
    for (; word + 4 <= n_words; word += 4) {
        for (int r = 0; r < panel_rows; r += 4) {
            transpose_4x4(rows + r, word, out + r * word_bytes);
        }
    }
    for (; word < n_words; ++word) {
        for (int r = 0; r < panel_rows; ++r)
            copy_word(out + word * line_bytes + r * word_bytes, rows[r], word * word_bytes);
    }
}

// Blocks of 32 become groups of 1,024: a group of all 16 rows at a time.
void pack_q8_0(const KernelTable& kernels, const std::uint8_t* const (&rows)[panel_rows],
               std::int64_t cols, std::uint8_t* out) {
    constexpr std::int64_t block_bytes = 2 + block_size;
    auto* const scales = reinterpret_cast<float*>(out);
    std::uint8_t* const bytes = out + n_groups(cols) * line_bytes;
    for (std::int64_t begin = 0; begin < cols; begin += group_size) {
        const std::int64_t n = std::min(group_size, cols - begin);
        std::int8_t q[panel_rows][group_size];
        const std::uint8_t* parts[panel_rows] = {};
        for (std::int64_t r = 0; r < panel_rows; ++r) {
            float* const scale = scales + begin / group_size * panel_rows + r;
            *scale = 0.0f;
            if (rows[r] == nullptr) continue;
            kernels.regroup_q8_0(q[r], scale, rows[r] + begin / block_size * block_bytes, n);
            parts[r] = reinterpret_cast<const std::uint8_t*>(q[r]);
        }
        transpose(parts, n / word_bytes, bytes + begin * panel_rows);
    }
}

void pack_q4_0(const std::uint8_t* const (&rows)[panel_rows], std::int64_t cols,
               std::uint8_t* out) {
    constexpr std::int64_t scale_bytes = 2, numbers = block_size / 2;
    constexpr std::int64_t block_bytes = scale_bytes + numbers;
    std::memset(out, 0, static_cast<std::size_t>(q4_scales_bytes(cols)));
    for (std::int64_t b = 0; b < cols / block_size; ++b) {
        const std::uint8_t* parts[panel_rows] = {};
        for (std::int64_t r = 0; r < panel_rows; ++r) {
            if (rows[r] == nullptr) continue;
            const std::uint8_t* const block = rows[r] + b * block_bytes;
            std::memcpy(out + (b * panel_rows + r) * scale_bytes, block, scale_bytes);
            parts[r] = block + scale_bytes;
        }
        transpose(parts, numbers / word_bytes,
                  out + q4_scales_bytes(cols) + b * numbers * panel_rows);
    }
}

void pack_bf16(const std::uint8_t* const (&rows)[panel_rows], std::int64_t cols, std::uint8_t* out,
               std::int64_t n_bytes) {
    transpose(rows, cols / 2, out);
    std::uint8_t* rest = out + cols / 2 * line_bytes;
    std::fill(rest, out + n_bytes, std::uint8_t{0});
    if (cols % 2 != 0) {
        for (int r = 0; r < panel_rows; ++r) {
            if (rows[r] != nullptr) std::memcpy(rest + r * word_bytes, rows[r] + (cols - 1) * 2, 2);
        }
    }
}

void unpack_q8_0(const std::uint8_t* panel, std::int64_t cols, std::int64_t r, float* out) {
    const std::uint8_t* const words = panel + n_groups(cols) * line_bytes + r * word_bytes;
    for (std::int64_t begin = 0; begin < cols; begin += group_size) {
        float scale;
        std::memcpy(&scale, panel + (begin / group_size * panel_rows + r) * word_bytes,
                    sizeof(scale));
        for (std::int64_t i = begin; i < std::min(begin + group_size, cols); i += 4) {
            std::int8_t q[4];
            std::memcpy(q, words + i / 4 * line_bytes, sizeof(q));
            for (int k = 0; k < 4; ++k)
                out[i + k] = scale * static_cast<float>(q[k]);
        }
    }
}

void unpack_q4_0(const std::uint8_t* panel, std::int64_t cols, std::int64_t r, float* out) {
    for (std::int64_t b = 0; b < cols / block_size; ++b, out += block_size) {
        std::uint16_t f16;
        std::memcpy(&f16, panel + (b * panel_rows + r) * 2, sizeof(f16));
        const float scale = float_from_f16(f16);
        const std::uint8_t* const block = panel + q4_scales_bytes(cols) + b * 256;
        for (int i = 0; i < 16; ++i) {
            const std::uint8_t both = block[i / 4 * line_bytes + r * word_bytes + i % 4];
            out[i] = scale * static_cast<float>((both & 15) - 8);
            out[i + 16] = scale * static_cast<float>((both >> 4) - 8);
        }
    }
}

}  // namespace

float float_from_f16(std::uint16_t f16) {
    const std::uint32_t exponent = (f16 >> 10) & 31u, mantissa = f16 & 1023u;
    float magnitude = static_cast<float>(mantissa) * 0x1p-24f;  // zero and subnormal
    if (exponent != 0) {
        const std::uint32_t bits = (exponent == 31 ? 255 : exponent + 112) << 23 | mantissa << 13;
        std::memcpy(&magnitude, &bits, sizeof(magnitude));
    }
    return (f16 & 0x8000u) != 0 ? -magnitude : magnitude;
}

std::size_t panel_bytes(DType dtype, std::int64_t cols) {
    std::int64_t n_bytes = cols * line_bytes;  // f32
    if (dtype == DType::bf16) {
        n_bytes = (cols + block_size - 1) / block_size * block_size / 2 * line_bytes;
    } else if (dtype == DType::q8_0) {
        n_bytes = n_groups(cols) * line_bytes + cols * panel_rows;
    } else if (dtype == DType::q4_0) {
        n_bytes = q4_scales_bytes(cols) + cols / 2 * panel_rows;
    }
    return static_cast<std::size_t>(n_bytes);
}

void pack_panels(const KernelTable& kernels, DType dtype, const std::uint8_t* source,
                 std::int64_t rows, std::int64_t cols, std::uint8_t* out, std::int64_t begin,
                 std::int64_t end) {
    const auto panel_size = static_cast<std::int64_t>(panel_bytes(dtype, cols));
    const auto row_size =
        static_cast<std::int64_t>(row_bytes(dtype, static_cast<std::uint64_t>(cols)));
    for (std::int64_t panel = begin; panel < end; ++panel) {
        const std::uint8_t* lines[panel_rows];
        for (std::int64_t r = 0; r < panel_rows; ++r) {
            const std::int64_t row = panel * panel_rows + r;
            lines[r] = row < rows ? source + row * row_size : nullptr;
        }
        std::uint8_t* const to = out + panel * panel_size;
        if (dtype == DType::f32) {
            transpose(lines, cols, to);
        } else if (dtype == DType::bf16) {
            pack_bf16(lines, cols, to, panel_size);
        } else if (dtype == DType::q8_0) {
            pack_q8_0(kernels, lines, cols, to);
        } else {
            pack_q4_0(lines, cols, to);
        }
    }
}

void unpack_row(DType dtype, const Panels& panels, std::int64_t row, float* out) {
    const std::uint8_t* const panel = panels.data + row / panel_rows * panels.panel_bytes;
    const std::int64_t r = row % panel_rows, cols = panels.cols;
    if (dtype == DType::q8_0) return unpack_q8_0(panel, cols, r, out);
    if (dtype == DType::q4_0) return unpack_q4_0(panel, cols, r, out);
    for (std::int64_t i = 0; i < cols; ++i) {
        if (dtype == DType::f32) {
            std::memcpy(out + i, panel + i * line_bytes + r * word_bytes, sizeof(*out));
        } else {
            std::uint8_t bytes[4] = {};
            std::memcpy(bytes + 2, panel + i / 2 * line_bytes + r * word_bytes + i % 2 * 2, 2);
            std::memcpy(out + i, bytes, sizeof(*out));
        }
    }
}

}  // namespace tinyllama

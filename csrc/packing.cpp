#include "packing.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace tinyllama {
namespace {

// Whatever the format, a panel's columns are words of 32 bits: a float, two bf16, four bytes or
// eight nibbles. Word i of row r lies at [i][r], so that packing is transposition.
constexpr std::int64_t word_bytes = 4;
constexpr std::int64_t line_bytes = panel_rows * word_bytes;

using Words = std::uint32_t __attribute__((vector_size(16)));

// Four words of four rows.
inline void transpose_4x4(const std::uint8_t* const* rows, std::int64_t word, std::uint8_t* out) {
    Words r[4];
    for (int i = 0; i < 4; ++i) {
        std::memcpy(&r[i], rows[i] + word * word_bytes, sizeof(r[i]));
    }
    const Words low01 = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5);
    const Words low23 = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5);
    const Words high01 = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7);
    const Words high23 = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
    const Words columns[4] = {__builtin_shufflevector(low01, low23, 0, 1, 4, 5),
                              __builtin_shufflevector(low01, low23, 2, 3, 6, 7),
                              __builtin_shufflevector(high01, high23, 0, 1, 4, 5),
                              __builtin_shufflevector(high01, high23, 2, 3, 6, 7)};
    for (int i = 0; i < 4; ++i) {
        std::memcpy(out + (word + i) * line_bytes, &columns[i], sizeof(columns[i]));
    }
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
        for (int r = 0; r < panel_rows; ++r) {
            std::memcpy(out + word * line_bytes + r * word_bytes, rows[r] + word * word_bytes,
                        word_bytes);
        }
    }
}

constexpr std::int64_t scale_bytes = 2;  // f16, before the numbers of each block in the file

// Bytes of a block's numbers in one row.
std::int64_t block_bytes(DType dtype) { return dtype == DType::q8_0 ? 32 : 16; }

// The bytes before the numbers of the first block: the scales of all.
std::int64_t scales_bytes(std::int64_t cols) {
    return (cols / block_size * panel_rows * scale_bytes + 63) / 64 * 64;
}

void pack_blocks(DType dtype, const std::uint8_t* const (&rows)[panel_rows], std::int64_t cols,
                 std::uint8_t* out) {
    const std::int64_t numbers = block_bytes(dtype), stride = scale_bytes + numbers;
    std::uint8_t* const blocks = out + scales_bytes(cols);
    for (std::int64_t b = 0; b < cols / block_size; ++b) {
        const std::uint8_t* parts[panel_rows];
        for (int r = 0; r < panel_rows; ++r) {
            std::memcpy(out + (b * panel_rows + r) * scale_bytes, rows[r] + b * stride,
                        scale_bytes);
            parts[r] = rows[r] + b * stride + scale_bytes;
        }
        transpose(parts, numbers / word_bytes, blocks + b * numbers * panel_rows);
    }
    std::uint8_t* const scales_end = out + cols / block_size * panel_rows * scale_bytes;
    std::fill(scales_end, blocks, std::uint8_t{0});
}

void pack_bf16(const std::uint8_t* const (&rows)[panel_rows], std::int64_t cols, std::uint8_t* out,
               std::int64_t n_bytes) {
    transpose(rows, cols / 2, out);
    std::uint8_t* rest = out + cols / 2 * line_bytes;
    std::fill(rest, out + n_bytes, std::uint8_t{0});
    if (cols % 2 != 0) {
        for (int r = 0; r < panel_rows; ++r) {
            std::memcpy(rest + r * word_bytes, rows[r] + (cols - 1) * 2, 2);
        }
    }
}

float float_from_f16(std::uint16_t f16) {
    const std::uint32_t exponent = (f16 >> 10) & 31u, mantissa = f16 & 1023u;
    float magnitude = static_cast<float>(mantissa) * 0x1p-24f;  // zero and subnormal
    if (exponent != 0) {
        const std::uint32_t bits = (exponent == 31 ? 255 : exponent + 112) << 23 | mantissa << 13;
        std::memcpy(&magnitude, &bits, sizeof(magnitude));
    }
    return (f16 & 0x8000u) != 0 ? -magnitude : magnitude;
}

float block_element(DType dtype, const std::uint8_t* panel, std::int64_t cols, std::int64_t r,
                    std::int64_t col) {
    const std::int64_t b = col / block_size, in_block = col % block_size;
    std::uint16_t f16;
    std::memcpy(&f16, panel + (b * panel_rows + r) * scale_bytes, sizeof(f16));
    const std::int64_t byte = in_block % block_bytes(dtype);
    const std::uint8_t bits = panel[scales_bytes(cols) + b * block_bytes(dtype) * panel_rows +
                                    byte / 4 * line_bytes + r * 4 + byte % 4];
    const int q = dtype == DType::q8_0 ? static_cast<std::int8_t>(bits)
                                       : (in_block < 16 ? bits & 15 : bits >> 4) - 8;
    return float_from_f16(f16) * static_cast<float>(q);
}

}  // namespace

std::size_t panel_bytes(DType dtype, std::int64_t cols) {
    std::int64_t n_bytes = cols * line_bytes;  // f32
    if (dtype == DType::bf16) {
        n_bytes = (cols + block_size - 1) / block_size * block_size / 2 * line_bytes;
    } else if (dtype != DType::f32) {
        n_bytes = scales_bytes(cols) + cols / block_size * block_bytes(dtype) * panel_rows;
    }
    return static_cast<std::size_t>(n_bytes);
}

void pack_panels(DType dtype, const std::uint8_t* source, std::int64_t rows, std::int64_t cols,
                 std::uint8_t* out, std::int64_t begin, std::int64_t end) {
    const auto panel_size = static_cast<std::int64_t>(panel_bytes(dtype, cols));
    const auto row_size =
        static_cast<std::int64_t>(row_bytes(dtype, static_cast<std::uint64_t>(cols)));
    const std::vector<std::uint8_t> zeros(static_cast<std::size_t>(row_size));
    for (std::int64_t panel = begin; panel < end; ++panel) {
        const std::uint8_t* lines[panel_rows];
        for (std::int64_t r = 0; r < panel_rows; ++r) {
            const std::int64_t row = panel * panel_rows + r;
            lines[r] = row < rows ? source + row * row_size : zeros.data();
        }
        std::uint8_t* const to = out + panel * panel_size;
        if (dtype == DType::f32) {
            transpose(lines, cols, to);
        } else if (dtype == DType::bf16) {
            pack_bf16(lines, cols, to, panel_size);
        } else {
            pack_blocks(dtype, lines, cols, to);
        }
    }
}

void unpack_row(DType dtype, const Panels& panels, std::int64_t row, float* out) {
    const std::uint8_t* const panel = panels.data + row / panel_rows * panels.panel_bytes;
    const std::int64_t r = row % panel_rows;
    for (std::int64_t i = 0; i < panels.cols; ++i) {
        if (dtype == DType::f32) {
            std::memcpy(out + i, panel + i * line_bytes + r * word_bytes, sizeof(*out));
        } else if (dtype == DType::bf16) {
            std::uint8_t bytes[4] = {};
            std::memcpy(bytes + 2, panel + i / 2 * line_bytes + r * word_bytes + i % 2 * 2, 2);
            std::memcpy(out + i, bytes, sizeof(*out));
        } else {
            out[i] = block_element(dtype, panel, panels.cols, r, i);
        }
    }
}

}  // namespace tinyllama

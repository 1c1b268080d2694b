// From the rows of a GGUF tensor to the panels that kernels read.
#pragma once

#include <cstddef>
#include <cstdint>

#include "gguf.h"
#include "kernels/kernel_table.h"

namespace tinyllama {

// Bytes of one panel of a matrix with `cols` columns: a multiple of 64. q8_0 and q4_0 need cols to
// be a multiple of 32.
std::size_t panel_bytes(DType dtype, std::int64_t cols);

// Packs panels [begin, end) of a row-major matrix (rows, cols) as the file holds it (f32, bf16,
// q8_0 or q4_0; `source` need not be aligned) into out, where panel 0 begins. After the last panel
// there must be panels_slack bytes that may be read.
void pack_panels(const KernelTable& kernels, DType dtype, const std::uint8_t* source,
                 std::int64_t rows, std::int64_t cols, std::uint8_t* out, std::int64_t begin,
                 std::int64_t end);

float float_from_f16(std::uint16_t f16);

// Row `row` of a packed matrix as floats: out has cols elements.
void unpack_row(DType dtype, const Panels& panels, std::int64_t row, float* out);

}  // namespace tinyllama

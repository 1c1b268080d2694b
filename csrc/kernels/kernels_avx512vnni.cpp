// Kernels for AVX-512 with VNNI (dot products of bytes). Compile with
//   -O3 -ffp-contract=off -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mavx2 -mfma
//   -mf16c
#include "kernel_table.h"

#ifdef __x86_64__
#include <immintrin.h>

namespace tinyllama {
namespace {
#include "vectors_avx512.inc"
// The order matters: the second is written over the first.

#include "kernels_x86.inc"
}  // namespace

const KernelTable kernels_avx512vnni = x86_table("avx512vnni");

}  // namespace tinyllama
#endif

// Kernels for AVX2 with FMA and F16C.
// Compile with -O3 -ffp-contract=off -mavx2 -mfma -mf16c
#include "kernel_table.h"

#ifdef __x86_64__
#include <immintrin.h>

namespace tinyllama {
namespace {
#include "vectors_avx2.inc"
// Each of these is written over what stands above it.

#include "kernels.inc"

#include "attention_sums.inc"

#include "attention.inc"

#include "kv_store.inc"
}  // namespace

const KernelTable kernels_avx2 = {
    "avx2",      matmul_f32,   matmul_bf16, matmul_q8_0, matmul_q4_0,
    quantize_q8, regroup_q8_0, round_bf16,  rms_norm,    rope,
    swiglu,      hand_out,     weigh,       store_kv,    attend,
};

}  // namespace tinyllama
#endif

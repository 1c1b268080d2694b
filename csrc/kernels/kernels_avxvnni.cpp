// Kernels for AVX2 with AVX-VNNI (dot products of bytes).
// Compile with -O3 -ffp-contract=off -mavx2 -mfma -mf16c -mavxvnni
#include "kernel_table.h"

#if defined(__x86_64__) && !defined(TINYLLAMA_WITHOUT_AVXVNNI)
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

const KernelTable kernels_avxvnni = {
    "avxvnni",   matmul_f32,   matmul_bf16, matmul_q8_0, matmul_q4_0,
    quantize_q8, regroup_q8_0, round_bf16,  rms_norm,    rope,
    swiglu,      hand_out,     weigh,       store_kv,    attend,
};

}  // namespace tinyllama
#endif

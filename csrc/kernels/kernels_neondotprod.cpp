// Kernels for Armv8 with dot products of bytes (FEAT_DotProd).
// Compile with -O3 -ffp-contract=off -march=armv8.2-a+dotprod
#include "kernel_table.h"

#ifdef __aarch64__
#include <arm_neon.h>

namespace tinyllama {
namespace {
#include "vectors_neon.inc"
// Each of these is written over what stands above it.

#include "kernels.inc"

#include "attention_sums.inc"

#include "attention.inc"

#include "kv_store.inc"
}  // namespace

const KernelTable kernels_neondotprod = {
    "neondotprod", matmul_f32,   matmul_bf16, matmul_q8_0, matmul_q4_0,
    quantize_q8,   regroup_q8_0, round_bf16,  rms_norm,    rope,
    swiglu,        hand_out,     weigh,       store_kv,    attend,
};

}  // namespace tinyllama
#endif

// Kernels for AVX-512 with VNNI, BF16 and AMX (tiles of int8 and bfloat16). The process must have
// asked the operating system for the tiles before (cpu.cpp).
// -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mavx512bf16
// -mamx-tile -mamx-int8 -mamx-bf16
#include "kernel_table.h"

#if defined(__x86_64__) && !defined(TINYLLAMA_WITHOUT_AMX)
#include <immintrin.h>

namespace tinyllama {
namespace {
#include "vectors_avx512.inc"
// Each of these is written over what stands above it.

#include "kernels.inc"

#include "attention_sums.inc"

#include "attention.inc"

#include "kv_store.inc"

#include "amx.inc"

#include "amx_attention.inc"

#include "amx_q24.inc"
}  // namespace

const KernelTable kernels_avx512amx = {
    "avx512amx",    matmul_f32,   amx_matmul_bf16, amx_matmul_q8_0, amx_matmul_q4_0,
    quantize_q8,    regroup_q8_0, round_bf16,      rms_norm,        rope,
    swiglu,         hand_out,     weigh,           store_kv,        amx_attend,
    amx_matmul_q24, quantize_q24,
};

}  // namespace tinyllama
#endif

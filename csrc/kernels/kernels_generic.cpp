// Kernels in plain C++: the meaning of all the other sets.
// Compile with -O3 -ffp-contract=off and no instruction-set flags.
#include <stdint.h>

#include "kernel_table.h"

namespace tinyllama {
namespace {
#include "vectors_generic.inc"
// Each of these is written over what stands above it.

#include "kernels.inc"

#include "attention_sums.inc"

#include "attention.inc"

#include "kv_store.inc"
}  // namespace

const KernelTable kernels_generic = {
    "generic",   matmul_f32,   matmul_bf16, matmul_q8_0, matmul_q4_0,
    quantize_q8, regroup_q8_0, round_bf16,  rms_norm,    rope,
    swiglu,      hand_out,     weigh,       store_kv,    attend,
};

}  // namespace tinyllama

// Which kernels this CPU can run, and the choice among them.
#pragma once

#include "kernel_table.h"

namespace tinyllama {

// Names of the kernel sets compiled in that this CPU (and its operating system) can run, best
// first, ending in "generic"; a null pointer ends the list.
const char* const* supported_isas();

// The named set, or the best one for null or "auto". Null when the name is unknown or this CPU
// cannot run it: the caller lists supported_isas() in its error.
const KernelTable* find_kernels(const char* name);

}  // namespace tinyllama

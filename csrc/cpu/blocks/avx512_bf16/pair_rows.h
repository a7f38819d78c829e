// pixel_rows of pairs: 1x1 filters of channels-last images and Linear, in bf16 with VDPBF16PS.
//
// Pixels are broadcast from where they lie, two channels at a time; filters are packed as panels of pairs. Nothing is widened.
// All channels are summed in one chain, so bits do not depend on how they are cut into blocks.
#pragma once

#include "core/kernel.h"

namespace fastconv::FASTCONV_TARGET {

// nullptr where pair_rows can run: 1x1 filters, and channels of x and filters of y contiguous.
const char* pair_rows_reject(const Conv2dProblem& a);
double pair_rows_cost(const Conv2dProblem& a, const Machine& machine);
int64_t pair_rows_workspace(const Conv2dProblem& a, const Machine& machine);
void pair_rows_run(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context);

// Kept filters, see Kernel::pack.
PackedFilters pair_rows_packed(const Conv2dProblem& a);
void pair_rows_pack(const Conv2dProblem& a, const void* w, void* packed);

}  // namespace fastconv::FASTCONV_TARGET

// pixel_rows for operands that are stored as halves: 1x1 filters of channels-last images, and Linear.
//
// Some hundred pixels at a time are widened into scratch, multiplied by pixel_rows, which widens filters where it packs them, and
// rounded once, behind the epilogue. Each number is converted once, not once for every panel of filters, and everything between
// is f32's code with f32's order of sums.
#pragma once

#include "core/kernel.h"
#include "cpu/simd/half.h"

namespace fastconv::FASTCONV_TARGET {

// nullptr where half_rows can run: 1x1 filters, and channels of x and filters of y contiguous.
const char* half_rows_reject(const Conv2dProblem& a);

template <class S>
int64_t half_rows_workspace(const Conv2dProblem& a, const Machine& machine);

// With filters as pixel_rows_pack<S> has packed them, or as they are.
template <class S>
void half_rows_run(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context);

extern template int64_t half_rows_workspace<bf16>(const Conv2dProblem&, const Machine&);
extern template int64_t half_rows_workspace<f16>(const Conv2dProblem&, const Machine&);
extern template void half_rows_run<bf16>(const Conv2dProblem&, const Conv2dArgs&, const Context&);
extern template void half_rows_run<f16>(const Conv2dProblem&, const Conv2dArgs&, const Context&);

}  // namespace fastconv::FASTCONV_TARGET

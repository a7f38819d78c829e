// filter_gradient of pairs: the gradient of bf16 1x1 filters of channels-last images, and of Linear's weight.
//
//   w[k][c] = sum over pixels of  y[pixel][k] * x[pixel][c]
//
// Two pixels at a time, so both operands are packed: the rows of two pixels become one of pairs. Pixels are one chain in their
// order; threads share out channels and filters.
#pragma once

#include "core/kernel.h"

namespace fastconv::FASTCONV_TARGET {

// nullptr where pair_gradient can run: 1x1 filters, and channels of x, y and w
// contiguous.
const char* pair_gradient_reject(const Conv2dProblem& a);
double pair_gradient_cost(const Conv2dProblem& a, const Machine& machine);
int64_t pair_gradient_workspace(const Conv2dProblem& a, const Machine& machine);
void pair_gradient_run(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context);

}  // namespace fastconv::FASTCONV_TARGET

// The gradient of the filters as a matrix multiplication that sums over output pixels:
//
//   w[k][tap][c] = sum over pixels of  y[pixel][k] * x[pixel shifted by tap][c]
//
// Rows are filters, columns are the channels of one tap. A chunk of at most 512 pixels is packed at a time, from either layout,
// and every filter of a block meets it while it is in L2. Chunks follow the shape of the problem, and threads share out columns
// and filters, never pixels: the bits do not depend on their number. Operands are stored as S and summed as compute_t<S>; halves
// are for 1x1 filters only.
#pragma once

#include "core/kernel.h"

namespace fastconv::FASTCONV_TARGET {

template <class S>
int64_t filter_gradient_workspace(const Conv2dProblem& a, const Machine& machine);

template <class S>
void filter_gradient_run(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context);

// The share of FMA peak that a problem of this shape reaches.
template <class S>
double filter_gradient_efficiency(const Conv2dProblem& a);

}  // namespace fastconv::FASTCONV_TARGET

// The gradient of a convolution's bias: bias[k] = sum over samples and pixels of y[n][k][p][q].
#pragma once

#include "core/kernel.h"
#include "cpu/simd/half.h"

namespace fastconv::FASTCONV_TARGET {

// Summed row by row, then rows in the order of n and p, so that neither threads nor the length of the sum show in the error.
// Operands are stored as S and summed as compute_t<S>.
template <class S>
void bias_gradient(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context);

extern template void bias_gradient<float>(const Conv2dProblem&, const Conv2dArgs&, const Context&);
extern template void bias_gradient<double>(const Conv2dProblem&, const Conv2dArgs&, const Context&);
extern template void bias_gradient<bf16>(const Conv2dProblem&, const Conv2dArgs&, const Context&);
extern template void bias_gradient<f16>(const Conv2dProblem&, const Conv2dArgs&, const Context&);

}  // namespace fastconv::FASTCONV_TARGET

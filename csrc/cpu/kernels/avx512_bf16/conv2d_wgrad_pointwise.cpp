// conv2d_wgrad.pointwise with products of pairs: the gradient of bf16 1x1 filters, and of Linear's weight: y transposed times x.
#include "cpu/blocks/avx512_bf16/pair_gradient.h"

namespace fastconv::FASTCONV_TARGET {

extern constinit const Kernel<Conv2dProblem> conv2d_wgrad_pointwise_bf16 = {1.0f, pair_gradient_reject, pair_gradient_cost,
                                                                            pair_gradient_workspace, pair_gradient_run};

}  // namespace fastconv::FASTCONV_TARGET

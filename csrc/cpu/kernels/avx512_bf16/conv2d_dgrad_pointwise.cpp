// conv2d_dgrad.pointwise with products of pairs: the input gradient of bf16 1x1 filters and of Linear, by the transposed filters.
#include "cpu/blocks/avx512_bf16/pair_rows.h"
#include "cpu/blocks/input_gradient.h"

namespace fastconv::FASTCONV_TARGET {

extern constinit const Kernel<Conv2dProblem> conv2d_dgrad_pointwise_bf16 = {
    1.0f, pair_rows_reject, input_gradient_cost<pair_rows_cost>, input_gradient_workspace<pair_rows_workspace>,
    input_gradient_run<bf16, pair_rows_run>};

}  // namespace fastconv::FASTCONV_TARGET

// The gradient of the filters by Winograd's F(m x m, r x r), stride 1: the same products as the forward's, summed over the tiles
// of the batch at every position.
//
//   sums[position][k][c] = sum over tiles of  (A y Aᵀ)[position][tile][k] * (Bᵀ x B)[position][tile][c]      w = Gᵀ sums G
//
// A block of channels and filters has its sums in one core's L2, and all tiles pass by them, a few at a time. Threads share out
// blocks, never tiles: the bits do not depend on their number.
#pragma once

#include "core/kernel.h"
#include "cpu/blocks/winograd_transform.h"

namespace fastconv::FASTCONV_TARGET {

template <class T, class F>
int64_t winograd_filter_gradient_workspace(const Conv2dProblem& a, const Machine& machine);

template <class T, class F>
void winograd_filter_gradient_run(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context);

template <class T, class F>
double winograd_filter_gradient_cost(const Conv2dProblem& a, const Machine& machine);

}  // namespace fastconv::FASTCONV_TARGET

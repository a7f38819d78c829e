// Convolution as a matrix multiplication whose rows are filters and whose columns are output pixels: the NCHW side.
//
//   y[k][pixel] = sum over channels and taps of  w[k][channel, tap] * x[channel][pixel shifted by tap]
//
// Filters are broadcast from where they lie. The column matrix (im2col) exists a block at a time, at most half an L2 of it: a
// block of the reduction for a block of pixels. Pixels run on over rows and samples, so a 7x7 map wastes no lanes.
#pragma once

#include "core/kernel.h"

namespace fastconv::FASTCONV_TARGET {

template <class T>
int64_t filter_rows_workspace(const Conv2dProblem& a, const Machine& machine);

template <class T>
void filter_rows_run(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context);

// The share of FMA peak that a problem of this shape reaches.
template <class T>
double filter_rows_efficiency(const Conv2dProblem& a);

}  // namespace fastconv::FASTCONV_TARGET

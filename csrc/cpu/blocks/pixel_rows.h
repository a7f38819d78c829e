// Convolution as a matrix multiplication whose rows are output pixels and whose columns are filters: the NHWC side.
//
//   y[pixel][k] = sum over taps and channels of  x[pixel shifted by tap][channel] * w[k][tap][channel]
//
// Pixels are broadcast from where they lie, through one pointer per row and tap; nothing is unrolled into a column matrix.
// Filters are packed in panels of at most four vectors, a block of the reduction at a time, so that what is packed stays in L2.
//
// W is what filters are stored as; pixels, bias, residual and outputs are compute_t<W>. Halves are widened where they are packed
// or read in place, and kept packed as halves: for 1x1 filters, see half_rows.h.
#pragma once

#include "core/kernel.h"
#include "cpu/simd/half.h"

namespace fastconv::FASTCONV_TARGET {

// nullptr where pixel_rows can run: channels of x and filters of y contiguous.
const char* pixel_rows_reject(const Conv2dProblem& a);

template <class W>
int64_t pixel_rows_workspace(const Conv2dProblem& a, const Machine& machine);

template <class W>
void pixel_rows_run(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context);

// Kept filters, see Kernel::pack: the panels of all blocks.
template <class W>
PackedFilters pixel_rows_packed(const Conv2dProblem& a);
template <class W>
void pixel_rows_pack(const Conv2dProblem& a, const void* w, void* packed);

// The share of FMA peak that a problem of this shape reaches: row and vector tails, and the cost of packing for one sample.
template <class W>
double pixel_rows_efficiency(const Conv2dProblem& a);

}  // namespace fastconv::FASTCONV_TARGET

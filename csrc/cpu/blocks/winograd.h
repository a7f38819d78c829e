// Winograd convolution F(m x m, r x r), stride 1: tiles of m x m outputs through (m+r-1)² matrix multiplications over the
// channels.
//
//   V[position][tile][c] = Bᵀ x B      U[position][c][k] = G w Gᵀ      y = Aᵀ ( V·U ) A
//
// NHWC and NCHW in place: transforms work on vectors of channels, and where channels are not contiguous a strip of tiles is
// transposed on its way in and out. F is
// F<m, r> of winograd_transform.h, which has the maps.
#pragma once

#include "core/kernel.h"
#include "cpu/blocks/winograd_transform.h"

namespace fastconv::FASTCONV_TARGET {

// nullptr where winograd_run can run: filters of r x r, stride 1, any dilation.
template <class F>
const char* winograd_reject(const Conv2dProblem& a);

template <class T, class F>
int64_t winograd_workspace(const Conv2dProblem& a, const Machine& machine);

template <class T, class F>
void winograd_run(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context);

// Kept filters, see Kernel::pack: U of all panels.
template <class T, class F>
PackedFilters winograd_packed(const Conv2dProblem& a);
template <class T, class F>
void winograd_pack(const Conv2dProblem& a, const void* w, void* packed);

template <class T, class F>
double winograd_cost(const Conv2dProblem& a, const Machine& machine);

}  // namespace fastconv::FASTCONV_TARGET

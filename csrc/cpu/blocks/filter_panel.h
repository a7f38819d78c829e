// Packing filters into the panels that gemm_tile reads as its vector operand: panel[tap][channel][filter].
#pragma once

#include "core/kernel.h"
#include "cpu/simd/vec.h"

namespace fastconv::FASTCONV_TARGET {

// Filters as they lie in memory: filter k, channel c of tap t is at w[k*k_step + c*c_step + t_offset[t]].
template <class T>
struct FilterSource {
  const T* w;
  int64_t k_step, c_step;
  const int64_t* t_offset;
  int64_t taps, channels;
};

// Fills panel[(t*channels + c)*width + k] for k < width; lanes from `filters` on are zero. width is a multiple of kLanes<T>.
//
// Each of the layouts that weights have is read along its contiguous direction and transposed in registers: a plain gather takes
// 1.5 cycles an element, which for 512 -> 512 channels of 3x3 at batch 1 would cost as much as the convolution itself.
template <class T>
void pack_filters(const FilterSource<T>& source, int64_t filters, int64_t width, T* panel);

extern template void pack_filters(const FilterSource<float>&, int64_t, int64_t, float*);
extern template void pack_filters(const FilterSource<double>&, int64_t, int64_t, double*);

}  // namespace fastconv::FASTCONV_TARGET

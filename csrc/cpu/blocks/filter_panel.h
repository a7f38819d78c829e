// Packing filters into the panels that gemm_tile reads as its vector operand: panel[tap][channel][filter].
#pragma once

#include "core/kernel.h"
#include "cpu/simd/half.h"

namespace fastconv::FASTCONV_TARGET {

// Filters as they lie in memory: filter k, channel c of tap t is at w[k*k_step + c*c_step + t_offset[t]].
template <class S>
struct FilterSource {
  const S* w;
  int64_t k_step, c_step;
  const int64_t* t_offset;
  int64_t taps, channels;
};

// Fills panel[(t*channels + c)*width + k] for k < width; lanes from `filters` on are zero. width is a multiple of the lanes of
// compute_t<S>, which is what the panel holds.
//
// Each of the layouts that weights have is read along its contiguous direction and transposed in registers: a plain gather takes
// 1.5 cycles an element, which for 512 -> 512 channels of 3x3 at batch 1 would cost as much as the convolution itself.
template <class S>
void pack_filters(const FilterSource<S>& source, int64_t filters, int64_t width, compute_t<S>* panel);

// Panels that are kept are of their filters' precision: `size` elements, whole vectors, there and back.
template <class S>
FC_INLINE void narrow_panel(const compute_t<S>* panel, int64_t size, S* kept) {
  for (int64_t i = 0; i < size; i += kLanes<compute_t<S>>) store(kept + i, load(panel + i));
}
template <class S>
FC_INLINE void widen_panel(const S* kept, int64_t size, compute_t<S>* panel) {
  for (int64_t i = 0; i < size; i += kLanes<compute_t<S>>) store(panel + i, load(kept + i));
}

extern template void pack_filters(const FilterSource<float>&, int64_t, int64_t, float*);
extern template void pack_filters(const FilterSource<double>&, int64_t, int64_t, double*);
extern template void pack_filters(const FilterSource<bf16>&, int64_t, int64_t, float*);
extern template void pack_filters(const FilterSource<f16>&, int64_t, int64_t, float*);

}  // namespace fastconv::FASTCONV_TARGET

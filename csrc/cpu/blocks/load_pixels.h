// One vector of neighbouring output columns' inputs: the strided load that every NCHW packing shares.
#pragma once

#include "cpu/simd/half.h"

namespace fastconv::FASTCONV_TARGET {

// Lanes lo..hi-1 are x[lane*step], the others zero; nothing else is read. 0 <= lo <= hi <= lanes.
template <class S>
FC_INLINE vec<compute_t<S>> load_pixels(const S* x, int64_t step, int lo, int hi) {
  using T = compute_t<S>;
  constexpr int kL = kLanes<T>;
  if (step == 1) return hi - lo == kL ? load(x) : load_range(x, lo, hi);
  if (step == 2) {
    vec<T> even, odd;
    deinterleave(load_range(x, 2 * lo, 2 * hi - 1), load_range(x + kL, 2 * lo - kL, 2 * hi - 1 - kL), even, odd);
    return even;
  }
  vec<T> r = zero<T>();
  for (int lane = lo; lane < hi; ++lane) r.v[lane] = wide(x[lane * step]);
  return r;
}

}  // namespace fastconv::FASTCONV_TARGET

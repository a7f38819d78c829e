// Which taps and which outputs of a convolution lie inside the input, and the arithmetic that every cost() shares.
#pragma once

#include "core/kernel.h"
#include "cpu/simd/vec.h"

namespace fastconv::FASTCONV_TARGET {

struct Range {
  int64_t begin, end;  // empty when end <= begin
};

// b > 0. A division takes as long as a tile on CPUs before Ice Lake, and most dilations are 1.
FC_INLINE int64_t ceil_div(int64_t a, int64_t b) { return b == 1 ? a : a > 0 ? (a + b - 1) / b : -(-a / b); }
FC_INLINE int64_t clamp(int64_t a, int64_t lo, int64_t hi) { return a < lo ? lo : a > hi ? hi : a; }

// The taps r of 0..count for which 0 <= start + r*dilation < size.
FC_INLINE Range taps_inside(int64_t count, int64_t dilation, int64_t start, int64_t size) {
  return {clamp(ceil_div(-start, dilation), 0, count), clamp(ceil_div(size - start, dilation), 0, count)};
}

// The outputs q of 0..count for which 0 <= q*stride + offset < size.
FC_INLINE Range outputs_inside(int64_t count, int64_t stride, int64_t offset, int64_t size) {
  return taps_inside(count, stride, offset, size);
}

FC_INLINE double conv2d_flops(const Conv2dProblem& a) {
  return 2.0 * double(a.N) * double(a.K) * double(a.P) * double(a.Q) * double(a.C / a.groups) * double(a.R) * double(a.S);
}

// Two FMA ports at 3 GHz on every core: only compared between kernels, so the clock does not matter, the lanes do.
template <class T>
FC_INLINE double peak_flops(const Machine& machine) {
  return 2.0 * 2.0 * kLanes<T> * 3e9 * machine.threads;
}

}  // namespace fastconv::FASTCONV_TARGET

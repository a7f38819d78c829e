// Filters for the loops whose lanes are filters (channel_lines.h).
#pragma once

#include "cpu/blocks/conv2d_geometry.h"

namespace fastconv::FASTCONV_TARGET {

// packed[vector][r][c][s][lane] = w[k, c, r, s], zero where there is no filter. The taps of a channel lie side by side in w,
// forwards or (for the input gradient) backwards; then they are transposed in registers.
template <class T>
void pack_channel_weights(const Conv2dProblem& a, const T* w, int64_t k0, int64_t vectors, T* packed) {
  constexpr int kL = kLanes<T>;
  const int64_t taps = a.R * a.S, filters = a.K / a.groups, inputs = a.C / a.groups;
  const int64_t direction = a.S > 1 ? a.w.s : a.R > 1 ? a.w.r : 1;
  const bool dense = (direction == 1 || direction == -1) && (a.S == 1 || a.R == 1 || a.w.r == a.w.s * a.S);
  for (int64_t v = 0; v < vectors; ++v, packed += taps * inputs * kL) {
    const int lanes = int(clamp(a.K - k0 - v * kL, 0, kL));
    const T* from[kL];
    for (int i = 0; i < lanes; ++i) {
      const int64_t k = k0 + v * kL + i;
      from[i] = w + (filters == 1 ? k * a.w.g : k / filters * a.w.g + k % filters * a.w.k);
    }
    for (int64_t c = 0; c < inputs; ++c) {
      const int64_t row_step = inputs * a.S * kL;
      T* const to = packed + c * a.S * kL;
      int64_t s = 0;
      T* row = to;
      const auto next = [&]() __attribute__((always_inline)) {
        if (++s == a.S) s = 0, row += row_step;
      };
      if (!dense) {
        for (int64_t t = 0; t < taps; ++t, next()) {
          const int64_t r = t / a.S;
          for (int i = 0; i < kL; ++i) row[s * kL + i] = i < lanes ? from[i][c * a.w.c + r * a.w.r + s * a.w.s] : T(0);
        }
        continue;
      }
      for (int64_t t = 0; t < taps; t += kL) {
        const int count = taps - t < kL ? int(taps - t) : kL;
        const int64_t first = c * a.w.c + (direction == 1 ? t : -(t + count - 1));
        vec<T> rows[kL];
#pragma GCC unroll 16
        for (int i = 0; i < kL; ++i) {
          rows[i] = i >= lanes ? zero<T>() : count == kL ? load(from[i] + first) : load(from[i] + first, count);
        }
        transpose(rows);
        T block[kL * kL];
#pragma GCC unroll 16
        for (int i = 0; i < kL; ++i) store(block + i * kL, rows[i]);
        for (int i = 0; i < count; ++i, next()) {
          store(row + s * kL, load(block + (direction == 1 ? i : count - 1 - i) * kL));
        }
      }
    }
  }
}

}  // namespace fastconv::FASTCONV_TARGET

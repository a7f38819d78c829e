// Where pooling windows lie, for all outputs of a problem at once. Shared by every pooling kernel; no arithmetic on values here.
#pragma once

#include "core/kernel.h"
#include "cpu/simd/vec.h"

#include "core/pool_axis.h"

namespace fastconv::FASTCONV_TARGET {

// Adaptive windows that divide the input evenly are ordinary windows: one problem the fewer for the fast kernels.
FC_INLINE Pool2dProblem pool_regular(Pool2dProblem p) {
  if (p.adaptive && p.H % p.P == 0 && p.W % p.Q == 0) {
    p.adaptive = false;
    p.R = p.stride_h = p.H / p.P;
    p.S = p.stride_w = p.W / p.Q;
    p.pad_top = p.pad_bottom = p.pad_left = p.pad_right = 0;
    p.dilation_h = p.dilation_w = 1;
  }
  return p;
}

// Windows wholly in the padding have no maximum and no first index; only the direct kernels know what to write there.
FC_INLINE bool pool_has_empty_window(const PoolAxis& a) {
  for (int64_t o = 0; o < a.out; ++o) {
    if (pool_window(a, o).empty()) return true;
  }
  return false;
}
FC_INLINE bool pool_has_empty_window(const Pool2dProblem& p) {
  return !p.adaptive && (pool_has_empty_window(pool_axis_h(p)) || pool_has_empty_window(pool_axis_w(p)));
}

// All windows of a problem, worked out once for all threads: an adaptive window costs four divisions, more than a small sum.
struct PoolWindows {
  PoolWindow *rows, *cols;  // (P), (Q)
  static FC_INLINE int64_t bytes(const Pool2dProblem& p) { return (p.P + p.Q) * int64_t(sizeof(PoolWindow)); }
};
FC_INLINE PoolWindows pool_windows(const Pool2dProblem& p, void* memory) {
  PoolWindow* const rows = static_cast<PoolWindow*>(memory);
  for (int64_t o = 0; o < p.P; ++o) rows[o] = pool_window(pool_axis_h(p), o);
  for (int64_t o = 0; o < p.Q; ++o) rows[p.P + o] = pool_window(pool_axis_w(p), o);
  return {rows, rows + p.P};
}

// All covers of a problem.
struct PoolCovers {
  PoolCover *rows, *cols;  // (H), (W)
  static FC_INLINE int64_t bytes(const Pool2dProblem& p) { return (p.H + p.W) * int64_t(sizeof(PoolCover)); }
};
FC_INLINE PoolCovers pool_covers(const Pool2dProblem& p, void* memory) {
  PoolCover* const rows = static_cast<PoolCover*>(memory);
  for (int64_t i = 0; i < p.H; ++i) rows[i] = pool_cover(pool_axis_h(p), i);
  for (int64_t i = 0; i < p.W; ++i) rows[p.H + i] = pool_cover(pool_axis_w(p), i);
  return {rows, rows + p.H};
}

// Taps of a typical window, for cost().
FC_INLINE double pool_taps_h(const Pool2dProblem& p) { return p.adaptive ? double(p.H) / double(p.P) + 0.5 : double(p.R); }
FC_INLINE double pool_taps_w(const Pool2dProblem& p) { return p.adaptive ? double(p.W) / double(p.Q) + 0.5 : double(p.S); }

// A place in the flattened loop over n, c and rows, advanced by counting: three divisions a row would cost as much as a short
// row.
struct PoolPlace {
  int64_t n, c, row, plane;  // plane = n * C + c
  FC_INLINE PoolPlace(int64_t task, int64_t C, int64_t rows)
      : n(task / rows / C), c(task / rows % C), row(task % rows), plane(task / rows) {}
  FC_INLINE void advance(int64_t C, int64_t rows) {
    if (++row < rows) return;
    row = 0;
    ++plane;
    if (++c < C) return;
    c = 0;
    ++n;
  }
};

FC_INLINE int64_t pool_round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }
FC_INLINE int64_t pool_ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The maximum's rule: a later value wins when it is larger or NaN, so that NaN propagates and ties go to the first.
template <class T>
FC_INLINE mask<T> pool_wins(vec<T> value, vec<T> best) {
  return greater(value, best) | is_nan(value);
}
template <class T>
FC_INLINE vec<T> pool_max(vec<T> value, vec<T> best) {
  return blend(is_nan(value), value, max(value, best));
}

template <class T>
inline constexpr T kPoolLowest = -__builtin_inff();

// A whole vector, or its first n lanes where the row ends.
template <class T>
FC_INLINE vec<T> load_up_to(const T* p, int n) {
  return n >= kLanes<T> ? load(p) : load(p, n);
}
template <class T>
FC_INLINE void store_up_to(T* p, vec<T> a, int n) {
  if (n >= kLanes<T>) {
    store(p, a);
  } else {
    store(p, a, n);
  }
}

template <class T>
FC_INLINE void fill(T* p, int64_t count, T value) {
  for (int64_t i = 0; i < count; ++i) p[i] = value;
}

// Predicted seconds of `cycles` on all threads; the clock is nominal, since costs are only compared.
FC_INLINE double pool_seconds(double cycles, const Machine& machine) { return cycles / 3e9 / machine.threads; }

}  // namespace fastconv::FASTCONV_TARGET

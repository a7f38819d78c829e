// Where pooling windows lie. Shared by every pooling kernel; no arithmetic on values here.
#pragma once

#include "core/kernel.h"
#include "cpu/simd/vec.h"

namespace fastconv::FASTCONV_TARGET {

// One axis of a Pool2dProblem.
struct PoolAxis {
  int64_t in, out, size, stride, pad_begin, pad_end, dilation;
  bool adaptive;
};

// The positions of one window along one axis that lie inside the input: begin, begin + step, ... < end. padded counts the window
// clipped to the padded input only: what count_include_pad divides by.
struct PoolWindow {
  int64_t begin, end, step, padded;
  FC_INLINE bool empty() const { return begin >= end; }
};

// The windows begin..end-1 that contain one position of the input (without dilation).
struct PoolCover {
  int64_t begin, end;
};

FC_INLINE PoolAxis pool_axis_h(const Pool2dProblem& p) {
  return {p.H, p.P, p.R, p.stride_h, p.pad_top, p.pad_bottom, p.dilation_h, p.adaptive};
}
FC_INLINE PoolAxis pool_axis_w(const Pool2dProblem& p) {
  return {p.W, p.Q, p.S, p.stride_w, p.pad_left, p.pad_right, p.dilation_w, p.adaptive};
}

FC_INLINE PoolWindow pool_window(const PoolAxis& a, int64_t o) {
  if (a.adaptive) {
    const int64_t begin = o * a.in / a.out, end = ((o + 1) * a.in + a.out - 1) / a.out;
    return {begin, end, 1, end - begin};
  }
  const int64_t start = o * a.stride - a.pad_begin;
  const int64_t past = start + a.size, last = start + (a.size - 1) * a.dilation;
  const int64_t padded_end = a.in + a.pad_end;
  const int64_t begin = start >= 0 ? start : start + (a.dilation - 1 - start) / a.dilation * a.dilation;
  return {begin, last < a.in ? last + 1 : a.in, a.dilation, (past < padded_end ? past : padded_end) - start};
}

FC_INLINE PoolCover pool_cover(const PoolAxis& a, int64_t i) {
  if (a.adaptive) return {i * a.out / a.in, ((i + 1) * a.out + a.in - 1) / a.in};
  const int64_t first = i + a.pad_begin - a.size + 1;  // the earliest start that still reaches i
  const int64_t begin = first <= 0 ? 0 : (first + a.stride - 1) / a.stride;
  const int64_t end = i + a.pad_begin < 0 ? 0 : (i + a.pad_begin) / a.stride + 1;
  return {begin, end < a.out ? end : a.out};
}

// What the window counts along one axis; the divisor is the product of both axes unless divisor_override says otherwise.
FC_INLINE int64_t pool_count(const Pool2dProblem& p, const PoolWindow& w) {
  return p.count_include_pad ? w.padded : w.end - w.begin;
}

FC_INLINE int64_t pool_divisor(const Pool2dProblem& p, const PoolWindow& rows, const PoolWindow& cols) {
  return p.divisor_override != 0 ? p.divisor_override : pool_count(p, rows) * pool_count(p, cols);
}

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

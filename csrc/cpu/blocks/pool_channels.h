// One window, or one position of a gradient, for vectors of channels: shared by the kernels that find channels side by side
// (NHWC) and those that put them there (transposed planes).
#pragma once

#include "cpu/blocks/pool_window.h"

namespace fastconv::FASTCONV_TARGET {

// Where rows and columns lie; channels are dense.
struct PoolSteps {
  int64_t h, w;
};

// n is the number of channels: whole vectors, unless kV is 1.
template <int kV, class T>
FC_INLINE vec<T> load_channels(const T* p, int v, int n) {
  if constexpr (kV > 1) {
    return load(p + v * kLanes<T>);
  } else {
    return load_up_to(p, n);
  }
}

// The maximum of one window from x (its plane's origin) on, and where it is: h * W + w. In the order of rows, then columns.
template <bool kIndices, int kV, class T>
FC_INLINE void max_window(const T* x, PoolSteps step, int64_t W, const PoolWindow& rows, const PoolWindow& cols, int n,
                          vec<T> (&best)[kV], index_vec<T> (&index)[kV]) {
  using Int = typename int_of<T>::type;
#pragma GCC unroll 4
  for (int v = 0; v < kV; ++v) {
    best[v] = set1(kPoolLowest<T>);
    index[v] = index_set1<T>(Int(rows.begin * W + cols.begin));
  }
  for (int64_t h = rows.begin; h < rows.end; h += rows.step) {
    for (int64_t w = cols.begin; w < cols.end; w += cols.step) {
      const T* tap = x + h * step.h + w * step.w;
      const index_vec<T> at = index_set1<T>(Int(h * W + w));
#pragma GCC unroll 4
      for (int v = 0; v < kV; ++v) {
        const vec<T> value = load_channels<kV>(tap, v, n);
        if constexpr (kIndices) {
          const mask<T> wins = pool_wins(value, best[v]);
          best[v] = blend(wins, value, best[v]);
          index[v] = blend(wins, at, index[v]);
        } else {
          best[v] = pool_max(value, best[v]);
        }
      }
    }
  }
}

// The average of one window. Each of its rows is summed on its own, so that rounding grows with R + S and not with R * S.
template <int kV, class T>
FC_INLINE void average_window(const T* x, PoolSteps step, T divisor, const PoolWindow& rows, const PoolWindow& cols, int n,
                              vec<T> (&sum)[kV]) {
#pragma GCC unroll 4
  for (int v = 0; v < kV; ++v) sum[v] = zero<T>();
  for (int64_t h = rows.begin; h < rows.end; ++h) {
    vec<T> row_sum[kV];
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) row_sum[v] = zero<T>();
    for (int64_t w = cols.begin; w < cols.end; ++w) {
      const T* tap = x + h * step.h + w * step.w;
#pragma GCC unroll 4
      for (int v = 0; v < kV; ++v) row_sum[v] = row_sum[v] + load_channels<kV>(tap, v, n);
    }
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) sum[v] = sum[v] + row_sum[v];
  }
#pragma GCC unroll 4
  for (int v = 0; v < kV; ++v) sum[v] = sum[v] / set1(divisor);
}

// What every window counts along each axis, and which windows cover each row and column of x.
struct PoolGather {
  int64_t *rows, *cols;  // (P), (Q)
  PoolCovers covers;     // (H), (W)
  static FC_INLINE int64_t bytes(const Pool2dProblem& a) { return (a.P + a.Q) * int64_t(sizeof(int64_t)) + PoolCovers::bytes(a); }
};
FC_INLINE PoolGather pool_gather(const Pool2dProblem& a, void* memory) {
  int64_t* const rows = static_cast<int64_t*>(memory);
  const bool fixed = a.divisor_override != 0;
  for (int64_t p = 0; p < a.P; ++p) rows[p] = fixed ? a.divisor_override : pool_count(a, pool_window(pool_axis_h(a), p));
  for (int64_t q = 0; q < a.Q; ++q) rows[a.P + q] = fixed ? 1 : pool_count(a, pool_window(pool_axis_w(a), q));
  return {rows, rows + a.P, pool_covers(a, rows + a.P + a.Q)};
}
FC_INLINE bool same_counts(const int64_t* counts, const PoolCover& cover) {
  for (int64_t i = cover.begin + 1; i < cover.end; ++i) {
    if (counts[i] != counts[cover.begin]) return false;
  }
  return true;
}

// The gradient of the average at one position: the windows ps x qs of y (its plane's origin), each over its divisor. Where all
// divide by the same, the sum is divided, once.
template <int kV, class T>
FC_INLINE void gather_windows(const PoolGather& g, const T* y, PoolSteps step, const PoolCover& ps, const PoolCover& qs, int n,
                              vec<T> (&sum)[kV]) {
#pragma GCC unroll 4
  for (int v = 0; v < kV; ++v) sum[v] = zero<T>();
  if (ps.begin >= ps.end || qs.begin >= qs.end) return;
  const bool same = same_counts(g.rows, ps) && same_counts(g.cols, qs);
  for (int64_t p = ps.begin; p < ps.end; ++p) {
    for (int64_t q = qs.begin; q < qs.end; ++q) {
      const T* from = y + p * step.h + q * step.w;
      const vec<T> divisor = set1(same ? T(1) : T(g.rows[p] * g.cols[q]));
#pragma GCC unroll 4
      for (int v = 0; v < kV; ++v) {
        const vec<T> gradient = load_channels<kV>(from, v, n);
        sum[v] = sum[v] + (same ? gradient : gradient / divisor);
      }
    }
  }
  if (same) {
    const vec<T> divisor = set1(T(g.rows[ps.begin] * g.cols[qs.begin]));
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) sum[v] = sum[v] / divisor;
  }
}

// One row of the average's gradient. Neighbours under the same windows have the same gradient, which is then only stored.
template <int kV, class T>
FC_INLINE void gather_row(const PoolGather& g, const T* y, PoolSteps step, int64_t W, const PoolCover& ps, T* x, int64_t x_step,
                          int n) {
  vec<T> sum[kV];
  PoolCover held{-1, -1};
  for (int64_t w = 0; w < W; ++w) {
    const PoolCover qs = g.covers.cols[w];
    if (qs.begin != held.begin || qs.end != held.end) {
      gather_windows<kV>(g, y, step, ps, qs, n, sum);
      held = qs;
    }
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) store_up_to(x + w * x_step + v * kLanes<T>, sum[v], kV > 1 ? kLanes<T> : n);
  }
}

}  // namespace fastconv::FASTCONV_TARGET

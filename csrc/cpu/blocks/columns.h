// Reading a matrix of rows by columns: the movement behind every packing that turns one contiguous direction into another.
#pragma once

#include "cpu/simd/half.h"

namespace fastconv::FASTCONV_TARGET {

// How far ahead rows are prefetched, in vectors: each row is a stream of its own, and sixteen at a time are more than the
// hardware follows across pages. 512 -> 2048 filters of 1x1 pack at 10.6 GB/s instead of 8.1; four vectors do as well, eight are
// worse.
inline constexpr int kPrefetchVectors = 2;

// Reads `count` consecutive elements of kLanes rows that are `step` apart (rows from `lanes` on count as zero) and hands them
// over as columns, a block at a time: emit(i, n, block), where block[m] is element i + m of all rows for m < n.
template <class S, class Emit>
FC_INLINE void for_each_block(const S* rows, int64_t step, int lanes, int64_t count, const Emit& emit) {
  using T = compute_t<S>;
  constexpr int kL = kLanes<T>;
  for (int64_t i = 0; i < count; i += kL) {
    const int n = count - i < kL ? int(count - i) : kL;
    vec<T> block[kL];
#pragma GCC unroll 16
    for (int m = 0; m < kL; ++m) {
      const S* row = rows + m * step + i;
      if (m < lanes) __builtin_prefetch(row + kPrefetchVectors * kL);
      block[m] = m >= lanes ? zero<T>() : n == kL ? load(row) : load(row, n);
    }
    transpose(block);
    emit(i, n, block);
  }
}

// The same, a column at a time: emit(i, vector of element i of all rows).
template <class S, class Emit>
FC_INLINE void for_each_column(const S* rows, int64_t step, int lanes, int64_t count, const Emit& emit) {
  using T = compute_t<S>;
  for_each_block(rows, step, lanes, count, [&](int64_t i, int n, const vec<T>(&block)[kLanes<T>]) {
    if (n == kLanes<T>) {
#pragma GCC unroll 16
      for (int m = 0; m < kLanes<T>; ++m) emit(i + m, block[m]);
    } else {
      for (int m = 0; m < n; ++m) emit(i + m, block[m]);
    }
  });
}

}  // namespace fastconv::FASTCONV_TARGET

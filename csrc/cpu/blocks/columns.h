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

// Columns of bf16 by whole vectors of pairs, which are transposed as floats are and widened behind that: half the shuffles of
// transposing floats, and none for widening. Returns how many columns it has done.
template <class Emit>
FC_INLINE int64_t for_each_pair(const bf16* rows, int64_t step, int lanes, int64_t count, const Emit& emit) {
  constexpr int kL = kLanes<float>;
  int64_t i = 0;
  for (; i + 2 * kL <= count; i += 2 * kL) {
    vec<float> block[kL];
#pragma GCC unroll 16
    for (int m = 0; m < kL; ++m) {
      const bf16* row = rows + m * step + i;
      if (m < lanes) __builtin_prefetch(row + kPrefetchVectors * 2 * kL);
      block[m] = m >= lanes ? zero<float>() : load(reinterpret_cast<const float*>(row));
    }
    transpose(block);
#pragma GCC unroll 16
    for (int m = 0; m < kL; ++m) {
      emit(i + 2 * m, widen_lower(block[m]));
      emit(i + 2 * m + 1, widen_upper(block[m]));
    }
  }
  return i;
}

// for_each_block, a column at a time: emit(i, vector of element i of all rows).
template <class S, class Emit>
FC_INLINE void for_each_column(const S* rows, int64_t step, int lanes, int64_t count, const Emit& given) {
  using T = compute_t<S>;
  int64_t done = 0;
  if constexpr (kIsBf16<S>) done = for_each_pair(rows, step, lanes, count, given);
  const auto emit = [&](int64_t i, vec<T> column) __attribute__((always_inline)) { given(done + i, column); };
  rows += done, count -= done;
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

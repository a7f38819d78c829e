// Reading a matrix of rows by columns: the movement behind every packing that turns one contiguous direction into another.
#pragma once

#include "cpu/simd/half.h"

namespace fastconv::FASTCONV_TARGET {

// How far ahead rows are fetched, in vectors: each row is a stream of its own, and sixteen at a time are more than the hardware
// follows across pages. 512 -> 2048 filters of 1x1 pack at 10.6 GB/s instead of 8.1; four vectors do as well.
struct ReadAhead {
  int64_t vectors = 2;
  // What is read behind element `end` of each row lies `jump` elements further than the row's own continuation.
  int64_t end = INT64_MAX, jump = 0;

  // Of rows that are read to their end, `left` elements away, and used at once; the next kLanes rows of the matrix follow. One
  // row of 25088 -> 4096 came at 20 GB/s with two vectors and comes at 30 with eight; 512 -> 1000, whose rows are short, at 15
  // and 25 (Zen 5, where a single stream reads 37).
  static FC_INLINE ReadAhead of_matrix(int64_t left, int64_t length, int64_t lanes, int64_t step) {
    return {8, left, lanes * step - length};
  }
  template <class S>
  FC_INLINE const S* from(const S* rows, int64_t i, int64_t elements) const {
    const int64_t at = i + vectors * elements;
    return rows + at + (at < end ? 0 : jump);
  }
};

// Reads `count` consecutive elements of kLanes rows that are `step` apart (rows from `lanes` on count as zero) and hands them
// over as columns, a block at a time: emit(i, n, block), where block[m] is element i + m of all rows for m < n.
template <class S, class Emit>
FC_INLINE void for_each_block(const S* rows, int64_t step, int lanes, int64_t count, const Emit& emit, ReadAhead ahead = {}) {
  using T = compute_t<S>;
  constexpr int kL = kLanes<T>;
  for (int64_t i = 0; i < count; i += kL) {
    const int n = count - i < kL ? int(count - i) : kL;
    const S* const next = ahead.from(rows, i, kL);
    vec<T> block[kL];
#pragma GCC unroll 16
    for (int m = 0; m < kL; ++m) {
      const S* row = rows + m * step + i;
      if (m < lanes) __builtin_prefetch(next + m * step);
      block[m] = m >= lanes ? zero<T>() : n == kL ? load(row) : load(row, n);
    }
    transpose(block);
    emit(i, n, block);
  }
}

// Columns of bf16 by whole vectors of pairs, which are transposed as floats are and widened behind that: half the shuffles of
// transposing floats, and none for widening. Returns how many columns it has done.
template <class Emit>
FC_INLINE int64_t for_each_pair(const bf16* rows, int64_t step, int lanes, int64_t count, const Emit& emit,
                                ReadAhead ahead = {}) {
  constexpr int kL = kLanes<float>;
  int64_t i = 0;
  for (; i + 2 * kL <= count; i += 2 * kL) {
    const bf16* const next = ahead.from(rows, i, 2 * kL);
    vec<float> block[kL];
#pragma GCC unroll 16
    for (int m = 0; m < kL; ++m) {
      const bf16* row = rows + m * step + i;
      if (m < lanes) __builtin_prefetch(next + m * step);
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
FC_INLINE void for_each_column(const S* rows, int64_t step, int lanes, int64_t count, const Emit& given, ReadAhead ahead = {}) {
  using T = compute_t<S>;
  int64_t done = 0;
  if constexpr (kIsBf16<S>) done = for_each_pair(rows, step, lanes, count, given, ahead);
  const auto emit = [&](int64_t i, vec<T> column) __attribute__((always_inline)) { given(done + i, column); };
  rows += done, count -= done, ahead.end -= done;
  for_each_block(
      rows, step, lanes, count,
      [&](int64_t i, int n, const vec<T>(&block)[kLanes<T>]) {
        if (n == kLanes<T>) {
#pragma GCC unroll 16
          for (int m = 0; m < kLanes<T>; ++m) emit(i + m, block[m]);
        } else {
          for (int m = 0; m < n; ++m) emit(i + m, block[m]);
        }
      },
      ahead);
}

}  // namespace fastconv::FASTCONV_TARGET

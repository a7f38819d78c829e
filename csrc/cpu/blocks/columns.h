// Reading a matrix of rows by columns: the movement behind every packing that turns one contiguous direction into another.
#pragma once

#include "cpu/simd/vec.h"

namespace fastconv::FASTCONV_TARGET {

// Reads `count` consecutive elements of kLanes rows that are `step` apart (rows from `lanes` on count as zero) and hands them
// over as columns: emit(i, vector of element i of all rows).
template <class T, class Emit>
FC_INLINE void for_each_column(const T* rows, int64_t step, int lanes, int64_t count, const Emit& emit) {
  constexpr int kL = kLanes<T>;
  for (int64_t i = 0; i < count; i += kL) {
    const int n = count - i < kL ? int(count - i) : kL;
    vec<T> block[kL];
#pragma GCC unroll 16
    for (int m = 0; m < kL; ++m) {
      const T* row = rows + m * step + i;
      block[m] = m >= lanes ? zero<T>() : n == kL ? load(row) : load(row, n);
    }
    transpose(block);
    if (n == kL) {
#pragma GCC unroll 16
      for (int m = 0; m < kL; ++m) emit(i + m, block[m]);
    } else {
      for (int m = 0; m < n; ++m) emit(i + m, block[m]);
    }
  }
}

}  // namespace fastconv::FASTCONV_TARGET

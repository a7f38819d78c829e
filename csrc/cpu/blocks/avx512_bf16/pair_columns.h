// Rows of bf16 read by columns of pairs: a transposition of 32-bit numbers, which halves half of a float's shuffles.
#pragma once

#include "cpu/blocks/columns.h"

namespace fastconv::FASTCONV_TARGET {

// Of kLanes rows that are `step` apart, of which those from `lanes` on count as zeros, the first `count` numbers in pairs:
// emit(i, pair i of all rows). A zero makes up the last pair of an odd count.
template <class Emit>
FC_INLINE void for_each_pair_column(const bf16* rows, int64_t step, int lanes, int64_t count, const Emit& emit) {
  constexpr int kL = kLanes<float>;
  for (int64_t i = 0; i < count; i += 2 * kL) {
    const int64_t n = count - i < 2 * kL ? count - i : 2 * kL;
    const __mmask32 there = _bzhi_u32(~0u, unsigned(n));
    vec<float> block[kL];
#pragma GCC unroll 16
    for (int m = 0; m < kL; ++m) {
      const bf16* row = rows + m * step + i;
      if (m < lanes) __builtin_prefetch(row + kPrefetchVectors * 2 * kL);
      block[m] = m >= lanes    ? zero<float>()
                 : n == 2 * kL ? load(reinterpret_cast<const float*>(row))
                               : vec<float>{_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(there, row))};
    }
    transpose(block);
    if (n == 2 * kL) {
#pragma GCC unroll 16
      for (int m = 0; m < kL; ++m) emit(i / 2 + m, block[m]);
    } else {
      for (int m = 0; 2 * m < n; ++m) emit(i / 2 + m, block[m]);
    }
  }
}

}  // namespace fastconv::FASTCONV_TARGET

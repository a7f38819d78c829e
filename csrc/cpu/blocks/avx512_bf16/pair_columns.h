// Rows of bf16 read by columns of pairs: a transposition of 32-bit numbers, which halves half of a float's shuffles.
#pragma once

#include "cpu/blocks/columns.h"

namespace fastconv::FASTCONV_TARGET {

// Two rows of numbers, of which one or both may be absent, as one of pairs: zeros where they are, and from `count` on.
FC_INLINE void interleave(const bf16* lower, const bf16* upper, int64_t count, int64_t width, bf16* pairs) {
  constexpr int64_t kL = kLanes<float>;
  const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  const __mmask32 has_lower = lower ? ~0u : 0u, has_upper = upper ? ~0u : 0u;
  lower = lower ? lower : pairs, upper = upper ? upper : pairs;
  for (int64_t k = 0; k < width; k += 2 * kL) {
    const int64_t n = count - k < 0 ? 0 : count - k;
    const __mmask32 some = _bzhi_u32(~0u, unsigned(n < 2 * kL ? n : 2 * kL));
    const __m512i x = _mm512_maskz_loadu_epi16(some & has_lower, lower + k),
                  y = _mm512_maskz_loadu_epi16(some & has_upper, upper + k);
    // The halves of each 128 bits, and those in their order.
    const __m512i a = _mm512_unpacklo_epi16(x, y), b = _mm512_unpackhi_epi16(x, y);
    _mm512_storeu_si512(pairs + 2 * k, _mm512_permutex2var_epi64(a, first, b));
    if (k + kL < width) _mm512_storeu_si512(pairs + 2 * (k + kL), _mm512_permutex2var_epi64(a, second, b));
  }
}

// narrow_pairs' numbers of a and b as pairs of the first, of the second, and so on.
FC_INLINE vec<float> side_by_side(vec<float> halves) {
  const __m512i pick = _mm512_cvtepu8_epi16(_mm256_setr_epi8(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25,
                                                             10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31));
  return {_mm512_castsi512_ps(_mm512_permutexvar_epi16(pick, _mm512_castps_si512(halves.v)))};
}

// Of kLanes rows that are `step` apart, of which those from `lanes` on count as zeros, the first `count` numbers in pairs:
// emit(i, pair i of all rows). A zero makes up the last pair of an odd count.
template <class Emit>
FC_INLINE void for_each_pair_column(const bf16* rows, int64_t step, int lanes, int64_t count, const Emit& emit,
                                    ReadAhead ahead = {}) {
  constexpr int kL = kLanes<float>;
  for (int64_t i = 0; i < count; i += 2 * kL) {
    const bf16* const next = ahead.from(rows, i, 2 * kL);
    const int64_t n = count - i < 2 * kL ? count - i : 2 * kL;
    const __mmask32 there = _bzhi_u32(~0u, unsigned(n));
    vec<float> block[kL];
#pragma GCC unroll 16
    for (int m = 0; m < kL; ++m) {
      const bf16* row = rows + m * step + i;
      if (m < lanes) __builtin_prefetch(next + m * step);
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

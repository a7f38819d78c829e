// Sums over one row, for layer normalisation.
#pragma once

#include "cpu/blocks/split.h"
#include "cpu/simd/vec.h"

namespace fastconv::FASTCONV_TARGET {

// An addition takes 4 cycles and two can start in each: eight chains would fill the ports, and the two sums of a pass have four
// each.
inline constexpr int kNormChains = 4;
// Longer rows are summed in pieces of 64 steps, which are then added: rounding grows with the pieces and not with the row.
template <class T>
inline constexpr int64_t kNormChunk = 64 * kNormChains * kLanes<T>;

// Two sums over the places 0..C-1 of a row. term(c, n, a, b) adds n places from c on to a and b; n is lanes but for the last
// vector. The order follows from C alone.
template <class T, class Term>
FC_INLINE void sum_row(int64_t C, const Term& term, T& first, T& second) {
  constexpr int kL = kLanes<T>;
  vec<T> total_a = zero<T>(), total_b = zero<T>();
  for (int64_t begin = 0; begin < C; begin += kNormChunk<T>) {
    const int64_t end = C - begin < kNormChunk<T> ? C : begin + kNormChunk<T>;
    vec<T> a[kNormChains], b[kNormChains];
    for (int i = 0; i < kNormChains; ++i) a[i] = b[i] = zero<T>();
    int64_t c = begin;
    for (; c + kNormChains * kL <= end; c += kNormChains * kL) {
#pragma GCC unroll 4
      for (int i = 0; i < kNormChains; ++i) term(c + i * kL, kL, a[i], b[i]);
    }
    for (; c + kL <= end; c += kL) term(c, kL, a[0], b[0]);
    if (c < end) term(c, int(end - c), a[1], b[1]);
    total_a = total_a + ((a[0] + a[1]) + (a[2] + a[3]));
    total_b = total_b + ((b[0] + b[1]) + (b[2] + b[3]));
  }
  first = reduce_add(total_a);
  second = reduce_add(total_b);
}

}  // namespace fastconv::FASTCONV_TARGET

// Softmax of rows whose scores come block by block (Milakov, Gimelshein 2018), and the addition of two such rows.
#pragma once

#include "cpu/blocks/attention.h"
#include "cpu/blocks/exp2.h"

namespace fastconv::FASTCONV_TARGET {

template <class T>
inline constexpr T kInfinity = T(__builtin_inf());

// What is known of a row after some of the keys: out * sum(sums) is the sum of exp2(score - most) * v.
template <class T>
struct SoftmaxRows {
  T *out, *sums, *most;  // [rows][width], [rows][lanes], [rows]

  FC_INLINE SoftmaxRows(Arena& arena, int64_t rows, int64_t width)
      : out(arena.take<T>(rows * width)), sums(arena.take<T>(rows * kLanes<T>)), most(arena.take<T>(rows)) {}
};

template <class T>
FC_INLINE T row_max(const T* s, int64_t begin, int64_t end) {
  constexpr int64_t kL = kLanes<T>;
  vec<T> most = set1(-kInfinity<T>), most2 = most;
  int64_t j = begin;
  for (; j + 2 * kL <= end; j += 2 * kL) {
    most = max(load(s + j), most);
    most2 = max(load(s + j + kL), most2);
  }
  return reduce_max(j < end ? max(load(s + j), max(most, most2)) : max(most, most2));
}

template <class T, class Exp>
FC_INLINE vec<T> exponentiate(T* s, int64_t begin, int64_t end, const Exp& exp2) {
  constexpr int64_t kL = kLanes<T>;
  vec<T> sum = zero<T>();
  int64_t j = begin;
  for (; j + 2 * kL <= end; j += 2 * kL) {
    const vec<T> p = exp2(load(s + j)), p2 = exp2(load(s + j + kL));
    store(s + j, p);
    store(s + j + kL, p2);
    sum = sum + p + p2;
  }
  if (j < end) {
    const vec<T> p = exp2(load(s + j));
    store(s + j, p);
    sum = sum + p;
  }
  return sum;
}

// exp2 of a tile of scores in place, their sums, and what was there before brought to the new maximum.
template <class T>
FC_INLINE void weigh(int64_t rows, T* s, int64_t begin, int64_t end, T factor, const SoftmaxRows<T>& state, int64_t width) {
  using Tile = AttentionTile<T>;
  constexpr int64_t kL = kLanes<T>, kRows = (Tile::kRows + kL - 1) / kL * kL;
  T top[kRows] = {}, rest[kRows], base[kRows], shrink[kRows];
  for (int64_t m = 0; m < rows; ++m) top[m] = row_max(s + m * Tile::kKeys, begin, end);
  for (int64_t m = 0; m < rows; m += kL) {
    const int n = int(rows - m < kL ? rows - m : kL);
    // Rounded to an integer, which saves two operations for every weight: none is above sqrt(2) all the same.
    const vec<T> mine = round(load(top + m) * set1(factor));
    const vec<T> before = load(state.most + m, n), peak = max(mine, before);
    store(state.most + m, peak, n);
    // Where nothing is visible yet: -inf - 0, and not -inf + inf.
    const vec<T> zeroed = blend(greater(peak, set1(-kInfinity<T>)), peak, zero<T>());
    store(base + m, zeroed);
    store(rest + m, mine - zeroed);
    store(shrink + m, exp2_weight(before - zeroed));
  }
  const T inverse = 1 / factor;
  for (int64_t m = 0; m < rows; ++m) {
    T *const sums = state.sums + m * kL, *const out = state.out + m * width, *const row = s + m * Tile::kKeys;
    if (shrink[m] != 1) {
      for (int64_t c = 0; c < width; c += kL) store(out + c, load(out + c) * set1(shrink[m]));
    }
    vec<T> sum;
    if (Exp2<T>::fits(base[m])) {
      sum = exponentiate(row, begin, end, Exp2<T>(factor, inverse, base[m]));
    } else {
      // Scores of millions, whose products differ by more than their roundings: what is left of the largest is exactly 0.
      const vec<T> largest = set1(top[m] == -kInfinity<T> ? T(0) : top[m]), below = set1(rest[m]);
      sum = exponentiate(row, begin, end, [&](vec<T> x) { return exp2_weight(fma(x - largest, set1(factor), below)); });
    }
    store(sums, fma(load(sums), set1(shrink[m]), sum));
  }
}

// Segments are added up one after the other: total += next.
template <class T>
FC_INLINE void add_segment(const SoftmaxRows<T>& total, const SoftmaxRows<T>& next, int64_t rows, int64_t width) {
  for (int64_t r = 0; r < rows; ++r) {
    const T peak = total.most[r] > next.most[r] ? total.most[r] : next.most[r];
    if (peak == -kInfinity<T>) continue;
    const vec<T> mine = set1(exp2_weight(total.most[r] - peak)), theirs = set1(exp2_weight(next.most[r] - peak));
    T *sums = total.sums + r * kLanes<T>, *out = total.out + r * width;
    store(sums, fma(load(next.sums + r * kLanes<T>), theirs, load(sums) * mine));
    for (int64_t c = 0; c < width; c += kLanes<T>) {
      store(out + c, fma(load(next.out + r * width + c), theirs, load(out + c) * mine));
    }
    total.most[r] = peak;
  }
}

}  // namespace fastconv::FASTCONV_TARGET

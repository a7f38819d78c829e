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

template <int kTogether, class T, class Exp>
FC_INLINE vec<T> exponentiate(T* s, KeyRange vectors, const Exp& exp2) {
  constexpr int64_t kL = kLanes<T>;
  vec<T> sum = zero<T>();
  int64_t j = vectors.begin;
  for (; j + kTogether * kL <= vectors.end; j += kTogether * kL) {
    vec<T> p[kTogether];
#pragma GCC unroll 4
    for (int i = 0; i < kTogether; ++i) p[i] = exp2(load(s + j + i * kL));
#pragma GCC unroll 4
    for (int i = 0; i < kTogether; ++i) {
      store(s + j + i * kL, p[i]);
      sum = sum + p[i];  // one after the other: the sum is the same wherever a tile begins
    }
  }
  for (; j < vectors.end; j += kL) {
    const vec<T> p = exp2(load(s + j));
    store(s + j, p);
    sum = sum + p;
  }
  return sum;
}

// A tile of scores times `factor`, and the largest of each row lane by lane.
template <class T>
struct Scores {
  int64_t rows;
  T* s;
  int64_t s_step;
  KeyRange vectors;
  T factor;
  const T* most;  // [rows][lanes]
};

// exp2 of a tile of scores in place and their sums. shrink[m] brings what there was of row m, if it has started, to its new
// maximum.
template <class T>
FC_INLINE void weigh(const Scores<T>& in, const SoftmaxRows<T>& state, bool started, T* shrink) {
  constexpr int64_t kL = kLanes<T>, kRows = AttentionTile<T>::kRowLanes;
  T top[kRows] = {}, rest[kRows], base[kRows];
  for (int64_t m = 0; m < in.rows; ++m) top[m] = reduce_max(load(in.most + m * kL));
  for (int64_t m = 0; m < in.rows; m += kL) {
    const int n = int(in.rows - m < kL ? in.rows - m : kL);
    // Rounded to an integer, which saves two operations for every weight: none is above sqrt(2) all the same.
    const vec<T> mine = round(load(top + m) * set1(in.factor));
    const vec<T> before = started ? load(state.most + m, n) : set1(-kInfinity<T>), peak = max(mine, before);
    store(state.most + m, peak, n);
    // Where nothing is visible yet: -inf - 0, and not -inf + inf.
    const vec<T> zeroed = blend(greater(peak, set1(-kInfinity<T>)), peak, zero<T>());
    store(base + m, zeroed);
    store(rest + m, mine - zeroed);
    store(shrink + m, exp2_weight(before - zeroed));
  }
  const vec<T> factor = set1(in.factor), inverse = set1(1 / in.factor);
  for (int64_t m = 0; m < in.rows; ++m) {
    T *const sums = state.sums + m * kL, *const row = in.s + m * in.s_step;
    vec<T> sum;
    if (Exp2<T>::fits(base[m])) {
      sum = exponentiate<kVectorRegisters == 32 ? 4 : 2>(row, in.vectors, Exp2<T>(factor, inverse, set1(base[m])));
    } else {
      // Scores of millions, whose products differ by more than their roundings: what is left of the largest is exactly 0.
      const vec<T> largest = set1(top[m] == -kInfinity<T> ? T(0) : top[m]), below = set1(rest[m]);
      sum = exponentiate<1>(row, in.vectors, [&](vec<T> x) { return exp2_weight(fma(x - largest, factor, below)); });
    }
    store(sums, started ? fma(load(sums), set1(shrink[m]), sum) : sum);
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

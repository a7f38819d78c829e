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
  // [rows][lanes]: the sums of the weights as they are multiplied, where they are rounded to pairs: what out is divided by, so
  // that a single key's value comes out as it is. lse is of the others.
  T* rounded;

  FC_INLINE SoftmaxRows(Arena& arena, int64_t rows, int64_t width, bool pairs)
      : out(arena.take<T>(rows * width)),
        sums(arena.take<T>(rows * kLanes<T>)),
        most(arena.take<T>(rows)),
        rounded(pairs ? arena.take<T>(rows * kLanes<T>) : nullptr) {}
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

#if FC_HAS_PAIRS
// Where weights go as pairs: rows so many elements apart. They stay in place of the scores too where they are wanted so.
struct PairWeights {
  bf16* p;
  int64_t step;
  bool keep;
};

struct WeightSums {
  vec<float> exact, rounded;
};

// Two vectors are rounded at once, always those of the same 32 keys of the block: a lane's sum is the same wherever a tile
// begins.
template <bool kKeep, class Exp>
FC_INLINE WeightSums exponentiate_pairs(float* s, KeyRange vectors, bf16* p, const Exp& exp2) {
  constexpr int64_t kL = kLanes<float>;
  const vec<float> ones = {(vec<float>::raw)index_set1<float>(0x3F803F80).v};
  WeightSums sums{zero<float>(), zero<float>()};
  const auto weight = [&](int64_t at) __attribute__((always_inline)) {
    const vec<float> x = exp2(load(s + at));
    if (kKeep) store(s + at, x);
    return x;
  };
  const auto round = [&](int64_t at, vec<float> low, vec<float> high) __attribute__((always_inline)) {
    const vec<float> pairs = narrow_pairs(low, high);
    store(reinterpret_cast<float*>(p + at), pairs);
    sums.rounded = add_pairs(sums.rounded, pairs, ones);
  };
  int64_t j = vectors.begin;
  if (j % (2 * kL) != 0) {
    const vec<float> x = weight(j);
    sums.exact = sums.exact + x;
    round(j - kL, zero<float>(), x);
    j += kL;
  }
  for (; j + 4 * kL <= vectors.end; j += 4 * kL) {
    vec<float> x[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) x[i] = weight(j + i * kL);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sums.exact = sums.exact + x[i];
    round(j, x[0], x[1]);
    round(j + 2 * kL, x[2], x[3]);
  }
  for (; j < vectors.end; j += 2 * kL) {
    const vec<float> low = weight(j), high = j + kL < vectors.end ? weight(j + kL) : zero<float>();
    sums.exact = sums.exact + low + high;
    round(j, low, high);
  }
  return sums;
}
#endif

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
// maximum. Row by row it is done by weights(m, row, exp2), which returns the sum lane by lane.
template <class T, class Weights>
FC_INLINE void weigh_rows(const Scores<T>& in, const SoftmaxRows<T>& state, bool started, T* shrink, const Weights& weights) {
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
      sum = weights(m, row, Exp2<T>(factor, inverse, set1(base[m])));
    } else {
      // Scores of millions, whose products differ by more than their roundings: what is left of the largest is exactly 0.
      const vec<T> largest = set1(top[m] == -kInfinity<T> ? T(0) : top[m]), below = set1(rest[m]);
      sum = weights(m, row, [&](vec<T> x) { return exp2_weight(fma(x - largest, factor, below)); });
    }
    store(sums, started ? fma(load(sums), set1(shrink[m]), sum) : sum);
  }
}

template <class T>
FC_INLINE void weigh(const Scores<T>& in, const SoftmaxRows<T>& state, bool started, T* shrink) {
  weigh_rows(in, state, started, shrink, [&](int64_t, T* row, const auto& exp2) __attribute__((always_inline)) {
    return exponentiate<kVectorRegisters == 32 ? 4 : 2>(row, in.vectors, exp2);
  });
}
#if FC_HAS_PAIRS
FC_INLINE void weigh(const Scores<float>& in, const SoftmaxRows<float>& state, bool started, float* shrink,
                     const PairWeights& to) {
  weigh_rows(in, state, started, shrink, [&](int64_t m, float* row, const auto& exp2) __attribute__((always_inline)) {
    bf16* const p = to.p + m * to.step;
    const WeightSums sums =
        to.keep ? exponentiate_pairs<true>(row, in.vectors, p, exp2) : exponentiate_pairs<false>(row, in.vectors, p, exp2);
    float* const rounded = state.rounded + m * kLanes<float>;
    store(rounded, started ? fma(load(rounded), set1(shrink[m]), sums.rounded) : sums.rounded);
    return sums.exact;
  });
}
#endif

// Segments are added up one after the other: total += next.
template <class T>
FC_INLINE void add_segment(const SoftmaxRows<T>& total, const SoftmaxRows<T>& next, int64_t rows, int64_t width) {
  for (int64_t r = 0; r < rows; ++r) {
    const T peak = total.most[r] > next.most[r] ? total.most[r] : next.most[r];
    if (peak == -kInfinity<T>) continue;
    const vec<T> mine = set1(exp2_weight(total.most[r] - peak)), theirs = set1(exp2_weight(next.most[r] - peak));
    T *sums = total.sums + r * kLanes<T>, *out = total.out + r * width;
    store(sums, fma(load(next.sums + r * kLanes<T>), theirs, load(sums) * mine));
    if (total.rounded) {
      T* const rounded = total.rounded + r * kLanes<T>;
      store(rounded, fma(load(next.rounded + r * kLanes<T>), theirs, load(rounded) * mine));
    }
    for (int64_t c = 0; c < width; c += kLanes<T>) {
      store(out + c, fma(load(next.out + r * width + c), theirs, load(out + c) * mine));
    }
    total.most[r] = peak;
  }
}

// What a row's weights add up to, with the sink's where there is one: sum * 2^most. Outputs are to be shrunk before they are
// divided by it.
template <class T>
struct Total {
  T sum, most, shrink = 1;

  FC_INLINE Total(T keys, T most_of_keys, T sink) : sum(keys), most(most_of_keys) {
    if (sink == -kInfinity<T>) return;
    constexpr double kLog2e = 1.4426950408889634074;
    const T place = T(double(sink) * kLog2e);
    if (keys == 0 || place > most) {
      shrink = keys == 0 ? T(0) : exp2_weight(most - place);
      most = place;
    }
    sum = keys * shrink + exp2_weight(place - most);
  }
  FC_INLINE T lse() const {
    constexpr double kLn2 = 0.69314718055994530942;
    return sum == 0 ? -kInfinity<T> : T(double(most) * kLn2 + __builtin_log(double(sum)));
  }
};

}  // namespace fastconv::FASTCONV_TARGET

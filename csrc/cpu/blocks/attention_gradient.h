// Rows of attention's backward pass: from scores to what is multiplied, and from sums to the gradients.
#pragma once

#include "cpu/blocks/attention.h"
#include "cpu/blocks/exp2.h"

namespace fastconv::FASTCONV_TARGET {

// One row of p and ds from its scores and dp, in place. `kept` is what dropout multiplies with, or absent.
template <class T>
FC_INLINE void differentiate(T* p, T* ds, const T* kept, KeyRange vectors, T factor, T lse, T delta) {
  const vec<T> scale = set1(factor), minus = set1(-lse), center = set1(delta);
  for (int64_t j = vectors.begin; j < vectors.end; j += kLanes<T>) {
    const vec<T> weight = exp2_weight(fma(load(p + j), scale, minus));
    vec<T> dp = load(ds + j), dropped = weight;
    if (kept) {
      dp = dp * load(kept + j);
      dropped = weight * load(kept + j);
    }
    store(p + j, dropped);
    store(ds + j, weight * (dp - center));
  }
}

// Writes `count` rows of a gradient, times a factor.
template <class S, class T = compute_t<S>>
void write_rows(S* target, int64_t step, int64_t feature_step, const T* rows, int64_t count, int64_t features, int64_t width,
                T factor) {
  for (int64_t l = 0; l < count; ++l, target += step, rows += width) {
    for (int64_t d = 0; d < features; d += kLanes<T>) {
      const int n = features - d < kLanes<T> ? int(features - d) : kLanes<T>;
      const vec<T> x = load(rows + d) * set1(factor);
      if (feature_step == 1) {
        store(target + d, x, n);
      } else {
        store_strided(target + d * feature_step, feature_step, x, n);
      }
    }
  }
}

}  // namespace fastconv::FASTCONV_TARGET

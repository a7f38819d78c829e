// Rows seen with a stride. A padded row is split into `stride` phases, phase f holding the columns j*stride + f - pad for j = 0,
// 1,
// ...: then tap s of every output is one contiguous run of one phase, loaded with plain vectors whatever the stride.
#pragma once

#include "cpu/blocks/pool_window.h"

namespace fastconv::FASTCONV_TARGET {

struct PhaseLayout {
  int64_t stride, pad, pitch;  // pitch: elements of one phase, a multiple of the vector
  int64_t columns;             // leading columns of the input that any window reads
  FC_INLINE int64_t size() const { return stride * pitch; }
  // Where output 0 finds the tap `ahead` columns from its window's start.
  FC_INLINE int64_t tap(int64_t ahead) const { return ahead % stride * pitch + ahead / stride; }
};

// Long enough that whole vectors of outputs may be computed past Q.
template <class T>
FC_INLINE PhaseLayout phase_layout(const Pool2dProblem& a) {
  const int64_t reach = (a.S - 1) * a.dilation_w;
  const int64_t pitch = pool_round_up(pool_round_up(a.Q, kLanes<T>) + reach / a.stride_w, kLanes<T>);
  const int64_t needed = (a.Q - 1) * a.stride_w + reach - a.pad_left + 1;
  return {a.stride_w, a.pad_left, pitch, needed < a.W ? needed : a.W};
}

// Writes the columns of one row into their phases and leaves the padding as it is. source(w, n) gives columns w, w+1, ...; only
// the first n lanes matter when n is less than a vector.
template <class T, class Source>
FC_INLINE void split_row(const PhaseLayout& layout, T* phases, const Source& source) {
  constexpr int kL = kLanes<T>;
  const int64_t columns = layout.columns;
  if (layout.stride == 1) {
    T* out = phases + layout.pad;
    int64_t w = 0;
    for (; w + kL <= columns; w += kL) store(out + w, source(w, kL));
    if (w < columns) store(out + w, source(w, int(columns - w)), int(columns - w));
  } else if (layout.stride == 2) {
    T* even = phases + layout.tap(layout.pad);
    T* odd = phases + layout.tap(layout.pad + 1);
    vec<T> e, o;
    int64_t w = 0;
    for (; w + 2 * kL <= columns; w += 2 * kL) {
      deinterleave(source(w, kL), source(w + kL, kL), e, o);
      store(even + w / 2, e);
      store(odd + w / 2, o);
    }
    if (w < columns) {
      const int n = int(columns - w);
      const vec<T> second = n > kL ? source(w + kL, n - kL) : zero<T>();
      deinterleave(source(w, n < kL ? n : kL), second, e, o);
      store(even + w / 2, e, (n + 1) / 2);
      store(odd + w / 2, o, n / 2);
    }
  } else {
    int64_t phase = layout.pad % layout.stride, j = layout.pad / layout.stride;
    for (int64_t w = 0; w < columns; w += kL) {
      const int n = int(columns - w < kL ? columns - w : kL);
      alignas(kVectorBytes) T lanes[kL];
      store(lanes, source(w, n));
      for (int i = 0; i < n; ++i) {
        phases[phase * layout.pitch + j] = lanes[i];
        if (++phase == layout.stride) phase = 0, ++j;
      }
    }
  }
}

}  // namespace fastconv::FASTCONV_TARGET

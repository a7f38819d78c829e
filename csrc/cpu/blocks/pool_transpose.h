// Planes to channels and back: kLanes planes at a time are laid side by side, so that vectors run along the channels.
#pragma once

#include "cpu/blocks/pool_channels.h"

namespace fastconv::FASTCONV_TARGET {

// count positions of up to kLanes planes, `step` apart, to out (count up to whole vectors, kLanes). Planes that do not exist are
// zero.
template <class T>
FC_INLINE void planes_to_channels(const T* x, int64_t step, int planes, int64_t count, T* out) {
  constexpr int kL = kLanes<T>;
  for (int64_t i = 0; i < count; i += kL) {
    const int n = int(count - i < kL ? count - i : kL);
    vec<T> tile[kL];
    if (n == kL && planes == kL) {
#pragma GCC unroll 16
      for (int c = 0; c < kL; ++c) tile[c] = load(x + c * step + i);
    } else {
#pragma GCC unroll 16
      for (int c = 0; c < kL; ++c) tile[c] = c < planes ? load(x + c * step + i, n) : zero<T>();
    }
    transpose(tile);
#pragma GCC unroll 16
    for (int c = 0; c < kL; ++c) store(out + (i + c) * kL, tile[c]);
  }
}

// And back, from in (count up to whole vectors, kLanes).
template <class T>
FC_INLINE void channels_to_planes(const T* in, int64_t count, T* y, int64_t step, int planes) {
  constexpr int kL = kLanes<T>;
  for (int64_t i = 0; i < count; i += kL) {
    const int n = int(count - i < kL ? count - i : kL);
    vec<T> tile[kL];
#pragma GCC unroll 16
    for (int c = 0; c < kL; ++c) tile[c] = load(in + (i + c) * kL);
    transpose(tile);
    if (n == kL && planes == kL) {
#pragma GCC unroll 16
      for (int c = 0; c < kL; ++c) store(y + c * step + i, tile[c]);
    } else {
#pragma GCC unroll 16
      for (int c = 0; c < kL; ++c) {
        if (c < planes) store(y + c * step + i, tile[c], n);
      }
    }
  }
}

// The same for indices, which widen on their way. Bits pass through the shuffles of T as they are.
template <class T>
FC_INLINE void channels_to_planes(const typename int_of<T>::type* in, int64_t count, int64_t* y, int64_t step, int planes) {
  constexpr int kL = kLanes<T>;
  for (int64_t i = 0; i < count; i += kL) {
    const int n = int(count - i < kL ? count - i : kL);
    vec<T> tile[kL];
#pragma GCC unroll 16
    for (int c = 0; c < kL; ++c) tile[c] = {(typename vec<T>::raw)index_load<T>(in + (i + c) * kL).v};
    transpose(tile);
#pragma GCC unroll 16
    for (int c = 0; c < kL; ++c) {
      if (c < planes) store_indices(y + c * step + i, index_vec<T>{(typename index_vec<T>::raw)tile[c].v}, n);
    }
  }
}

// Which problems can be transposed: their planes are dense.
FC_INLINE const char* pool_transpose_rejects(const Pool2dProblem& a) {
  const bool x_dense = (a.x.w == 1 || a.W == 1) && (a.x.h == a.W || a.H == 1);
  const bool y_dense = (a.y.w == 1 || a.Q == 1) && (a.y.h == a.Q || a.P == 1);
  return x_dense && y_dense ? nullptr : "the planes of x and y are not dense";
}

// Output rows begin..end-1 that are pooled together, so that their input and output stay in the L2 as channels.
struct PoolBand {
  int64_t begin, end, h_begin, h_end;
};
constexpr int64_t kBandBytes =
    128 * 1024;  // of input, and of output: an eighth of a 1 MB L2 each, for the planes pass through too

// As many rows of `width` positions as fit; one at least.
template <class T>
FC_INLINE int64_t pool_band_rows(int64_t width) {
  const int64_t rows = kBandBytes / (width * kVectorBytes);
  return rows < 1 ? 1 : rows;
}
// The band that starts at output row p: one row at least.
template <class T>
FC_INLINE PoolBand pool_band(const Pool2dProblem& a, const PoolWindow* windows, int64_t p) {
  PoolBand band{p, p + 1, windows[p].begin, windows[p].end};
  const int64_t in_rows = pool_band_rows<T>(a.W), out_rows = pool_band_rows<T>(a.Q);
  for (; band.end < a.P && band.end - p < out_rows; ++band.end) {
    const PoolWindow& next = windows[band.end];
    const int64_t begin = next.begin < band.h_begin ? next.begin : band.h_begin,
                  end = next.end > band.h_end ? next.end : band.h_end;
    if (end - begin > in_rows) break;
    band.h_begin = begin;
    band.h_end = end;
  }
  return band;
}
// Elements of scratch that the input and the output of any band need.
template <class T>
FC_INLINE int64_t pool_band_input(const Pool2dProblem& a) {
  const int64_t window = a.adaptive ? a.H / a.P + 2 : (a.R - 1) * a.dilation_h + 1, rows = pool_band_rows<T>(a.W);
  const int64_t most = rows > window ? rows : window;
  return pool_round_up((most < a.H ? most : a.H) * a.W, kLanes<T>) * kLanes<T>;
}
template <class T>
FC_INLINE int64_t pool_band_output(const Pool2dProblem& a) {
  const int64_t rows = pool_band_rows<T>(a.Q);
  return pool_round_up((rows < a.P ? rows : a.P) * a.Q, kLanes<T>) * kLanes<T>;
}

// Cycles to transpose all planes of x and y: 10 for each vector, as measured, of which 4 are shuffles.
template <class T>
FC_INLINE double pool_transpose_cycles(const Pool2dProblem& a) {
  return double(a.N * pool_ceil_div(a.C, kLanes<T>)) * 10 *
         double(pool_round_up(a.H * a.W, kLanes<T>) + pool_round_up(a.P * a.Q, kLanes<T>));
}

}  // namespace fastconv::FASTCONV_TARGET

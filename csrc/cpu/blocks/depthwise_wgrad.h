// What the loop nests of the depthwise weight gradient share: how the taps are cut into register tiles and the rows into pieces,
// and how sums become a gradient.
#pragma once

#include "cpu/blocks/depthwise.h"
#include "cpu/blocks/split.h"

namespace fastconv::FASTCONV_TARGET {

// Taps whose sums are in registers at a time: kRows rows of the filter x kColumns of its columns. Taps that fill no tile come one
// by one, at less than half the speed.
//
// All nine of a 3x3: each is a chain of its own, and nine hide the latency of 4 cycles on two FMA ports. AVX-512 holds all 25 of
// a 5x5 beside y and x; with 16 registers it is one column of five, and for 7x7 one of seven everywhere: in NCHW a row of x then
// serves seven taps.
template <int kS>
struct TapTile;
template <>
struct TapTile<2> {
  static constexpr int rows = 2, columns = 2;
};
template <>
struct TapTile<3> {
  static constexpr int rows = 3, columns = 3;
};
template <>
struct TapTile<5> {
  static constexpr int rows = 5, columns = kVectorRegisters == 32 ? 5 : 1;
};
template <>
struct TapTile<7> {
  static constexpr int rows = 7, columns = 1;
};

// visit.template operator()<rows, columns>(r, s) for tiles that cover rows r_begin..r_end and all S columns of a filter.
template <int kS, class Visit>
FC_INLINE void for_each_tap_tile(int64_t r_begin, int64_t r_end, int64_t S, const Visit& visit) {
  constexpr int kRows = TapTile<kS>::rows, kColumns = TapTile<kS>::columns;
  int64_t r = r_begin;
  for (; r + kRows <= r_end; r += kRows) {
    int64_t s = 0;
    for (; s + kColumns <= S; s += kColumns) visit.template operator()<kRows, kColumns>(r, s);
    for (; s < S; ++s) {
      for (int i = 0; i < kRows; ++i) visit.template operator()<1, 1>(r + i, s);
    }
  }
  for (; r < r_end; ++r) {
    for (int64_t s = 0; s < S; ++s) visit.template operator()<1, 1>(r, s);
  }
}

// Calls visit.template operator()<S of the register tile>().
template <class Visit>
FC_INLINE void with_tap_tile(int64_t S, const Visit& visit) {
  if (S == 7) return visit.template operator()<7>();
  if (S == 5) return visit.template operator()<5>();
  if (S % 2 == 0) return visit.template operator()<2>();
  return visit.template operator()<3>();
}

// Rows of y are summed in pieces, so that a few channels keep many threads busy. How many there are depends on the problem alone,
// and they are added in order: the bits do not depend on the threads. A piece is at least kPieceRows rows long.
inline constexpr int64_t kWantedTasks = 16, kPieceRows = 16;

FC_INLINE EvenSplit row_pieces(int64_t rows, int64_t rows_at_a_time, int64_t blocks) {
  const int64_t most = rows * rows_at_a_time / kPieceRows, wanted = (kWantedTasks + blocks - 1) / blocks;
  const int64_t pieces = clamp(wanted, 1, most < 1 ? 1 : most);
  return EvenSplit(rows, (rows + pieces - 1) / pieces);
}

// Adds n values, a multiple of the lanes, to `to` and clears them.
template <class T>
FC_INLINE void move_sums(T* from, T* to, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    store(to + i, load(to + i) + load(from + i));
    store(from + i, zero<T>());
  }
}

// dw and the bias gradient of vector v of channels, from sums [input][R][S][lane] and, behind them, [lane] of the bias.
template <class T>
void write_channel_gradient(const Conv2dProblem& a, const Conv2dArgs& args, int64_t v, const T* sums) {
  constexpr int kL = kLanes<T>;
  const int64_t filters = a.K / a.groups, inputs = a.C / a.groups;
  const int lanes = int(clamp(a.K - v * kL, 0, kL));
  T* to[kL];
  for (int i = 0; i < lanes; ++i) {
    const int64_t k = v * kL + i, g = filters == 1 ? k : k / filters;
    to[i] = static_cast<T*>(args.w) + g * a.w.g + (k - g * filters) * a.w.k;
  }
  const bool dense = a.w.s == 1 && a.w.r == a.S && kL >= 8;
  for (int64_t c = 0; c < inputs && dense; ++c) {
    for (int64_t t = 0; t < a.R * a.S; t += kL) {  // a filter's taps are neighbours
      const int count = int(clamp(a.R * a.S - t, 0, kL));
      vec<T> rows[kL];
#pragma GCC unroll 16
      for (int i = 0; i < kL; ++i) rows[i] = i < count ? load(sums + i * kL) : zero<T>();
      transpose(rows);
#pragma GCC unroll 16
      for (int i = 0; i < kL; ++i) {
        if (i < lanes) store(to[i] + c * a.w.c + t, rows[i], count);
      }
      sums += count * kL;
    }
  }
  for (int64_t c = 0; c < inputs && !dense; ++c) {
    for (int64_t r = 0; r < a.R; ++r) {
      for (int64_t s = 0; s < a.S; ++s, sums += kL) {
        const int64_t offset = c * a.w.c + r * a.w.r + s * a.w.s;
        for (int i = 0; i < lanes; ++i) to[i][offset] = sums[i];
      }
    }
  }
  if (a.epilogue.bias) store(static_cast<T*>(args.bias) + v * kL, load(sums), lanes);
}

// Vectors over channels (NHWC), any number of channels in a group.
template <class T>
void depthwise_wgrad_channels_run(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context);
template <class T>
int64_t depthwise_wgrad_channels_workspace(const Conv2dProblem& a, const Machine& machine);
// The same on pixels where they lie: small depthwise filters.
template <class T>
bool depthwise_wgrad_in_place(const Conv2dProblem& a);
template <class T>
void depthwise_wgrad_pixels_run(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context);
template <class T>
int64_t depthwise_wgrad_pixels_workspace(const Conv2dProblem& a, const Machine& machine);
// The same for NCHW planes.
template <class T>
void depthwise_wgrad_planes_run(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context);
template <class T>
int64_t depthwise_wgrad_planes_workspace(const Conv2dProblem& a, const Machine& machine);
// Vectors along the row, any strides, one channel in a group.
template <class T>
void depthwise_wgrad_rows_run(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context);
template <class T>
int64_t depthwise_wgrad_rows_workspace(const Conv2dProblem& a, const Machine& machine);

extern template void depthwise_wgrad_channels_run<float>(const Conv2dProblem&, const Conv2dArgs&, const Context&);
extern template void depthwise_wgrad_channels_run<double>(const Conv2dProblem&, const Conv2dArgs&, const Context&);
extern template int64_t depthwise_wgrad_channels_workspace<float>(const Conv2dProblem&, const Machine&);
extern template int64_t depthwise_wgrad_channels_workspace<double>(const Conv2dProblem&, const Machine&);
extern template bool depthwise_wgrad_in_place<float>(const Conv2dProblem&);
extern template bool depthwise_wgrad_in_place<double>(const Conv2dProblem&);
extern template void depthwise_wgrad_pixels_run<float>(const Conv2dProblem&, const Conv2dArgs&, const Context&);
extern template void depthwise_wgrad_pixels_run<double>(const Conv2dProblem&, const Conv2dArgs&, const Context&);
extern template int64_t depthwise_wgrad_pixels_workspace<float>(const Conv2dProblem&, const Machine&);
extern template int64_t depthwise_wgrad_pixels_workspace<double>(const Conv2dProblem&, const Machine&);
extern template void depthwise_wgrad_planes_run<float>(const Conv2dProblem&, const Conv2dArgs&, const Context&);
extern template void depthwise_wgrad_planes_run<double>(const Conv2dProblem&, const Conv2dArgs&, const Context&);
extern template int64_t depthwise_wgrad_planes_workspace<float>(const Conv2dProblem&, const Machine&);
extern template int64_t depthwise_wgrad_planes_workspace<double>(const Conv2dProblem&, const Machine&);
extern template void depthwise_wgrad_rows_run<float>(const Conv2dProblem&, const Conv2dArgs&, const Context&);
extern template void depthwise_wgrad_rows_run<double>(const Conv2dProblem&, const Conv2dArgs&, const Context&);
extern template int64_t depthwise_wgrad_rows_workspace<float>(const Conv2dProblem&, const Machine&);
extern template int64_t depthwise_wgrad_rows_workspace<double>(const Conv2dProblem&, const Machine&);

}  // namespace fastconv::FASTCONV_TARGET

#include "cpu/blocks/thin_tile.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

template <class W, int kRows>
void tile(const ThinInput<W>& in, const TileOutput<compute_t<W>>& out) {
  using T = compute_t<W>;
  vec<T> sum[kRows];
  for (int m = 0; m < kRows; ++m) sum[m] = zero<T>();
  for_each_column(
      in.w, in.k_step, in.filters, in.depth,
      [&](int64_t d, vec<T> column) {
#pragma GCC unroll 8
        for (int m = 0; m < kRows; ++m) sum[m] = fma(set1(in.a[m][d]), column, sum[m]);
      },
      in.ahead);
  T sums[kRows * kLanes<T>];
  for (int m = 0; m < kRows; ++m) store(sums + m * kLanes<T>, sum[m]);
  store_sums(sums, kLanes<T>, kRows, out);
}

template <class W, int kRows>
void pick(int rows, const ThinInput<W>& in, const TileOutput<compute_t<W>>& out) {
  if (rows == kRows) return tile<W, kRows>(in, out);
  if constexpr (kRows > 1) pick<W, kRows - 1>(rows, in, out);
}

// Depths from a load of the panel to its prefetch: a row of it is two lines, and the hardware stops at every page.
constexpr int64_t kPanelAhead = 16;

template <class W, int kRows, int kVectors>
void add_columns(const ThinPanel<W>& in, int first, compute_t<W>* sums) {
  using T = compute_t<W>;
  constexpr int kL = kLanes<T>;
  vec<T> sum[kRows][kVectors];
  for (int m = 0; m < kRows; ++m) {
    for (int v = 0; v < kVectors; ++v) sum[m][v] = zero<T>();
  }
  const W* w = in.w + first * kL;
  for (int64_t d = 0; d < in.depth; ++d, w += in.width) {
    for (int v = 0; v < kVectors; v += 2) __builtin_prefetch(w + v * kL + kPanelAhead * in.width);
    vec<T> panel[kVectors];
    for (int v = 0; v < kVectors; ++v) panel[v] = load(w + v * kL);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const vec<T> row = set1(in.a[m][d]);
      for (int v = 0; v < kVectors; ++v) sum[m][v] = fma(row, panel[v], sum[m][v]);
    }
  }
  for (int m = 0; m < kRows; ++m) {
    for (int v = 0; v < kVectors; ++v) store(sums + m * in.width + (first + v) * kL, sum[m][v]);
  }
}

template <class W, int kRows, int kVectors>
FC_INLINE void add_some(int vectors, const ThinPanel<W>& in, int first, compute_t<W>* sums) {
  if (vectors >= kVectors) return add_columns<W, kRows, kVectors>(in, first, sums);
  if constexpr (kVectors > 1) add_some<W, kRows, kVectors - 1>(vectors, in, first, sums);
}

// All vectors at once, so that lines are read in their order, where registers are enough; else two at a time.
template <class W, int kRows>
void pick_panel(int rows, int vectors, const ThinPanel<W>& in, const TileOutput<compute_t<W>>& out) {
  using T = compute_t<W>;
  if (rows == kRows) {
    T sums[kRows * GemmTile::kMaxVectors * kLanes<T>];
    constexpr int kMost = (kRows + 1) * GemmTile::kMaxVectors < kVectorRegisters ? GemmTile::kMaxVectors : 2;
    for (int v = 0; v < vectors; v += kMost) add_some<W, kRows, kMost>(vectors - v, in, v, sums);
    return store_sums(sums, int(in.width), kRows, out);
  }
  if constexpr (kRows > 1) pick_panel<W, kRows - 1>(rows, vectors, in, out);
}

}  // namespace

template <class W>
void thin_panel(int rows, int vectors, const ThinPanel<W>& in, const TileOutput<compute_t<W>>& out) {
  pick_panel<W, kThinRows>(rows, vectors, in, out);
}

template void thin_panel(int, int, const ThinPanel<bf16>&, const TileOutput<float>&);
template void thin_panel(int, int, const ThinPanel<f16>&, const TileOutput<float>&);

template <class W>
void thin_tile(int rows, const ThinInput<W>& in, const TileOutput<compute_t<W>>& out) {
  pick<W, kThinRows>(rows, in, out);
}

template void thin_tile(int, const ThinInput<float>&, const TileOutput<float>&);
template void thin_tile(int, const ThinInput<double>&, const TileOutput<double>&);
template void thin_tile(int, const ThinInput<bf16>&, const TileOutput<float>&);
template void thin_tile(int, const ThinInput<f16>&, const TileOutput<float>&);

}  // namespace fastconv::FASTCONV_TARGET

#include "cpu/blocks/thin_tile.h"

#include "cpu/blocks/columns.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

template <class W, int kRows>
void tile(const ThinInput<W>& in, const TileOutput<compute_t<W>>& out) {
  using T = compute_t<W>;
  vec<T> sum[kRows];
  for (int m = 0; m < kRows; ++m) sum[m] = zero<T>();
  for_each_column(in.w, in.k_step, in.filters, in.depth, [&](int64_t d, vec<T> column) {
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) sum[m] = fma(set1(in.a[m][d]), column, sum[m]);
  });
  T sums[kRows * kLanes<T>];
  for (int m = 0; m < kRows; ++m) store(sums + m * kLanes<T>, sum[m]);
  store_sums(sums, kLanes<T>, kRows, out);
}

template <class W, int kRows>
void pick(int rows, const ThinInput<W>& in, const TileOutput<compute_t<W>>& out) {
  if (rows == kRows) return tile<W, kRows>(in, out);
  if constexpr (kRows > 1) pick<W, kRows - 1>(rows, in, out);
}

}  // namespace

template <class W>
void thin_tile(int rows, const ThinInput<W>& in, const TileOutput<compute_t<W>>& out) {
  pick<W, kThinRows>(rows, in, out);
}

template void thin_tile(int, const ThinInput<float>&, const TileOutput<float>&);
template void thin_tile(int, const ThinInput<double>&, const TileOutput<double>&);
template void thin_tile(int, const ThinInput<bf16>&, const TileOutput<float>&);
template void thin_tile(int, const ThinInput<f16>&, const TileOutput<float>&);

}  // namespace fastconv::FASTCONV_TARGET

#include "cpu/blocks/thin_tile.h"

#include "cpu/blocks/columns.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

template <class T, int kRows>
void tile(const ThinInput<T>& in, const TileOutput<T>& out) {
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

template <class T, int kRows>
void pick(int rows, const ThinInput<T>& in, const TileOutput<T>& out) {
  if (rows == kRows) return tile<T, kRows>(in, out);
  if constexpr (kRows > 1) pick<T, kRows - 1>(rows, in, out);
}

}  // namespace

template <class T>
void thin_tile(int rows, const ThinInput<T>& in, const TileOutput<T>& out) {
  pick<T, kThinRows>(rows, in, out);
}

template void thin_tile(int, const ThinInput<float>&, const TileOutput<float>&);
template void thin_tile(int, const ThinInput<double>&, const TileOutput<double>&);

}  // namespace fastconv::FASTCONV_TARGET

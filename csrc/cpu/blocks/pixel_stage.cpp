#include "cpu/blocks/pixel_stage.h"

#include "cpu/blocks/activation.h"
#include "cpu/blocks/columns.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// Rows without a gap between them are one row.
FC_INLINE void join_rows(const Stride4& stride, int64_t& rows, int64_t& columns) {
  if (stride.h == columns) columns *= rows, rows = 1;
}

template <class T>
__attribute__((noinline)) void finish(vec<T>& value, const T* residual, int count, Activation activation) {
  if (residual) value = value + load(residual, count);
  value = activate(activation, value);
}

}  // namespace

template <class T>
void planes_to_pixels(const T* planes, const Stride4& from, int64_t channels, int64_t rows, int64_t columns, T* pixels) {
  constexpr int kL = kLanes<T>;
  const int64_t step = round_up(channels, kL);
  join_rows(from, rows, columns);
  for (int64_t h = 0; h < rows; ++h, pixels += columns * step) {
    for (int64_t c = 0; c < channels; c += kL) {
      const int lanes = int(channels - c < kL ? channels - c : kL);
      T* const to = pixels + c;
      for_each_column(planes + h * from.h + c * from.c, from.c, lanes, columns,
                      [&](int64_t i, vec<T> value) __attribute__((always_inline)) { store(to + i * step, value); });
    }
  }
}

template <class T>
void pixels_to_planes(const T* pixels, const Stride4& to, int64_t channels, int64_t rows, int64_t columns, T* planes,
                      const T* residual, Activation activation) {
  constexpr int kL = kLanes<T>;
  const int64_t step = round_up(channels, kL);
  const bool plain = !residual && activation == Activation::none;
  join_rows(to, rows, columns);
  for (int64_t h = 0; h < rows; ++h, pixels += columns * step) {
    for (int64_t c = 0; c < channels; c += kL) {
      const int lanes = int(channels - c < kL ? channels - c : kL);
      const int64_t first = h * to.h + c * to.c;
      for (int64_t i = 0; i < columns; i += kL) {
        const int count = int(columns - i < kL ? columns - i : kL);
        vec<T> block[kL];
#pragma GCC unroll 16
        for (int m = 0; m < kL; ++m) block[m] = m < count ? load(pixels + (i + m) * step + c) : zero<T>();
        transpose(block);
        if (plain && count == kL && lanes == kL) {
#pragma GCC unroll 16
          for (int m = 0; m < kL; ++m) store(planes + first + m * to.c + i, block[m]);
          continue;
        }
        for (int m = 0; m < lanes; ++m) {
          const int64_t offset = first + m * to.c + i;
          vec<T> value = block[m];
          if (!plain) finish(value, residual ? residual + offset : nullptr, count, activation);
          store(planes + offset, value, count);
        }
      }
    }
  }
}

template void planes_to_pixels(const float*, const Stride4&, int64_t, int64_t, int64_t, float*);
template void planes_to_pixels(const double*, const Stride4&, int64_t, int64_t, int64_t, double*);
template void pixels_to_planes(const float*, const Stride4&, int64_t, int64_t, int64_t, float*, const float*, Activation);
template void pixels_to_planes(const double*, const Stride4&, int64_t, int64_t, int64_t, double*, const double*, Activation);

}  // namespace fastconv::FASTCONV_TARGET

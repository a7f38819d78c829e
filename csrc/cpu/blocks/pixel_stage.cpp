#include "cpu/blocks/pixel_stage.h"

#include "cpu/blocks/activation.h"
#include "cpu/blocks/columns.h"
#include "cpu/blocks/load_pixels.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// Rows without a gap between them are one row.
FC_INLINE void join_rows(const Stride4& stride, int64_t& rows, int64_t& columns) {
  if (stride.h == columns) columns *= rows, rows = 1;
}

// Columns of a tile. Pixels of a tile are a run of memory, of which all channels are written, or read, before the next: plane by
// plane each line of an image's pixels would be on another page.
template <class T>
constexpr int64_t kTile = 4 * kLanes<T>;

// move(channel, lanes, row, first column, columns), all channels of a tile one after the other.
template <class T, class Move>
FC_INLINE void for_each_tile(int64_t channels, int64_t rows, int64_t columns, const Move& move) {
  for (int64_t h = 0; h < rows; ++h) {
    for (int64_t first = 0; first < columns; first += kTile<T>) {
      for (int64_t c = 0; c < channels; c += kLanes<T>) {
        const int lanes = int(channels - c < kLanes<T> ? channels - c : kLanes<T>);
        move(c, lanes, h, first, columns - first < kTile<T> ? columns - first : kTile<T>);
      }
    }
  }
}

template <class T>
__attribute__((noinline)) void finish(vec<T>& value, const T* residual, int count, Activation activation) {
  if (residual) value = value + load(residual, count);
  value = activate(activation, value);
}

}  // namespace

template <class T>
void planes_to_pixels(const T* planes, const Stride4& from, int64_t channels, int64_t rows, int64_t columns, T* pixels,
                      int64_t step) {
  constexpr int kL = kLanes<T>;
  if (from.w == 1) join_rows(from, rows, columns);
  for_each_tile<T>(channels, rows, columns, [&](int64_t c, int lanes, int64_t h, int64_t first, int64_t count) {
    const int room = int(step - c < kL ? step - c : kL);
    const T* const lines = planes + c * from.c + h * from.h + first * from.w;
    T* to = pixels + (h * columns + first) * step + c;
    if (from.w == 1 && room == kL) {
      for_each_column(lines, from.c, lanes, count,
                      [&](int64_t i, vec<T> value) __attribute__((always_inline)) { store(to + i * step, value); });
      return;
    }
    for (int64_t i = 0; i < count; i += kL) {
      const int n = int(count - i < kL ? count - i : kL);
      vec<T> block[kL];
#pragma GCC unroll 16
      for (int m = 0; m < kL; ++m) {
        const T* const line = lines + m * from.c + i * from.w;
        block[m] = m >= lanes ? zero<T>() : n == kL ? load_pixels(line, from.w, 0, kL) : load_pixels(line, from.w, 0, n);
      }
      transpose(block);
      for (int m = 0; m < n; ++m, to += step) store(to, block[m], room);
    }
  });
}

template <class T>
void pixels_to_planes(const T* pixels, int64_t step, const Stride4& to, int64_t channels, int64_t rows, int64_t columns,
                      T* planes, const T* residual, Activation activation) {
  constexpr int kL = kLanes<T>;
  const bool plain = !residual && activation == Activation::none;
  join_rows(to, rows, columns);
  for_each_tile<T>(channels, rows, columns, [&](int64_t c, int lanes, int64_t h, int64_t begin, int64_t length) {
    const int64_t first = h * to.h + c * to.c + begin;
    const T* const from = pixels + (h * columns + begin) * step + c;
    for (int64_t i = 0; i < length; i += kL) {
      const int count = int(length - i < kL ? length - i : kL);
      vec<T> block[kL];
#pragma GCC unroll 16
      for (int m = 0; m < kL; ++m) block[m] = m < count ? load(from + (i + m) * step) : zero<T>();
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
  });
}

template void planes_to_pixels(const float*, const Stride4&, int64_t, int64_t, int64_t, float*, int64_t);
template void planes_to_pixels(const double*, const Stride4&, int64_t, int64_t, int64_t, double*, int64_t);
template void pixels_to_planes(const float*, int64_t, const Stride4&, int64_t, int64_t, int64_t, float*, const float*,
                               Activation);
template void pixels_to_planes(const double*, int64_t, const Stride4&, int64_t, int64_t, int64_t, double*, const double*,
                               Activation);

}  // namespace fastconv::FASTCONV_TARGET

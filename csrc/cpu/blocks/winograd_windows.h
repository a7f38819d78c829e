// What Winograd's forward and its filter gradient share: the tiles of a batch, and square windows of an image, one for each tile,
// mapped along both axes into  positions[position][tile][channel].
//
// Maps work on vectors of channels. Where channels are not contiguous, a strip of windows is transposed first.
#pragma once

#include "cpu/blocks/conv2d_geometry.h"
#include "cpu/blocks/load_pixels.h"
#include "cpu/blocks/winograd_transform.h"

namespace fastconv::FASTCONV_TARGET {

// Tiles of one row that are transposed together, where channels are not contiguous: 64 pixels for F(4x4).
inline constexpr int64_t kStripTiles = 16;

// A dilated convolution is one without dilation on each of dilation_h x dilation_w *phases*: images of every dilation_h-th row
// and dilation_w-th column. Phase i of the outputs reads one phase of the inputs. What follows counts phases as images: (n *
// dilation_h + i) * dilation_w + j.
struct DilationPhase {
  int64_t n, i, j;

  FC_INLINE DilationPhase(int64_t image, int64_t dilation_h, int64_t dilation_w)
      : n(image / dilation_w / dilation_h), i(image / dilation_w % dilation_h), j(image % dilation_w) {}
};

// Of `size` rows, those of phase `i`.
FC_INLINE int64_t rows_of_phase(int64_t size, int64_t i, int64_t dilation) {
  return dilation == 1 ? size : size > i ? (size - i + dilation - 1) / dilation : 0;
}

// The outputs of the batch as tiles.
template <class F>
struct Grid {
  int64_t down, across, count;  // tiles of an image, of the batch

  explicit FC_INLINE Grid(const Conv2dProblem& a)
      : down(tiles_of(rows_of_phase(a.P, 0, a.dilation_h))),
        across(tiles_of(rows_of_phase(a.Q, 0, a.dilation_w))),
        count(a.N * a.dilation_h * a.dilation_w * down * across) {}

  static FC_INLINE int64_t tiles_of(int64_t outputs) { return (outputs + F::kOutput - 1) / F::kOutput; }

  // visit(image, first output row, tile column, tiles, tiles before) for stretches of at most kStripTiles tiles of one row.
  template <class Visit>
  FC_INLINE void for_each_strip(int64_t begin, int64_t end, const Visit& visit) const {
    for (int64_t t = begin; t < end;) {
      const int64_t column = t % across, row = t / across % down, n = t / across / down;
      int64_t tiles = across - column < end - t ? across - column : end - t;
      tiles = tiles < kStripTiles ? tiles : kStripTiles;
      visit(n, row * F::kOutput, column, tiles, t - begin);
      t += tiles;
    }
  }
};

// Bᵀ x B: windows overlap by a filter less one.
template <class F>
struct InputWindow {
  static constexpr int kSize = F::kInput;
  template <class T>
  static FC_INLINE void map(const vec<T>* line, vec<T>* mapped) {
    winograd_input<F>(line, mapped);
  }
};

// A y Aᵀ: windows are the tiles themselves.
template <class F>
struct OutputWindow {
  static constexpr int kSize = F::kOutput;
  template <class T>
  static FC_INLINE void map(const vec<T>* line, vec<T>* mapped) {
    winograd_output_gradient<F>(line, mapped);
  }
};

// Some channels of a batch of images, zero outside.
template <class T>
struct Image {
  const T* at;  // of the first channel
  Stride4 stride;
  int64_t H, W, channels;
  int64_t top, left;  // rows and columns before the first, where the window of the first tile starts
  int64_t dilation_h = 1, dilation_w = 1;

  // The image that a phase of the outputs reads.
  FC_INLINE Image phase(int64_t image) const {
    if (dilation_h == 1 && dilation_w == 1) {
      Image whole = *this;
      whole.at += image * stride.n;
      return whole;
    }
    const DilationPhase phase(image, dilation_h, dilation_w);
    const auto first = [](int64_t start, int64_t dilation) { return (start % dilation + dilation) % dilation; };
    const int64_t i = first(phase.i - top, dilation_h), j = first(phase.j - left, dilation_w);
    return {at + phase.n * stride.n + i * stride.h + j * stride.w,
            {0, stride.c, stride.h * dilation_h, stride.w * dilation_w},
            rows_of_phase(H, i, dilation_h),
            rows_of_phase(W, j, dilation_w),
            channels,
            (i - (phase.i - top)) / dilation_h,
            (j - (phase.j - left)) / dilation_w};
  }
};

// positions[position][tile][channel]. A vector between positions keeps them out of one another's cache sets.
template <class T>
struct Positions {
  T* at;
  int64_t step, tile_step;
};

// Elements of the strip that for_each_window needs.
template <class F, class T>
constexpr int64_t kStripElements = F::kInput * (kStripTiles * F::kOutput + F::kTaps + kLanes<T>)*kLanes<T>;

// The part of a window that lies in the image, and the channels of its vector that exist.
struct Inside {
  Range rows, columns;
  int lanes;
};

// read(i, j) is a vector of the window's row i, column j.
template <class F, class Window, class T, class Read>
FC_INLINE void map_pixels(const Read& read, T* to, int64_t step) {
  vec<T> half[F::kInput][Window::kSize], line[Window::kSize], mapped[F::kInput];
  for (int j = 0; j < Window::kSize; ++j) {
#pragma GCC unroll 8
    for (int i = 0; i < Window::kSize; ++i) line[i] = read(i, j);
    Window::map(line, mapped);
#pragma GCC unroll 8
    for (int i = 0; i < F::kInput; ++i) half[i][j] = mapped[i];
  }
  for (int i = 0; i < F::kInput; ++i) {
    Window::map(half[i], mapped);
#pragma GCC unroll 8
    for (int j = 0; j < F::kInput; ++j) store(to + (i * F::kInput + j) * step, mapped[j]);
  }
}

template <class F, class Window, class T>
void map_window(const T* x, int64_t row_step, int64_t column_step, T* to, int64_t step) {
  map_pixels<F, Window>([&](int i, int j) { return load(x + i * row_step + j * column_step); }, to, step);
}

// Zero outside. What is not inside is not read, and takes no branch.
template <class F, class Window, class T>
void map_edge(const T* x, int64_t row_step, int64_t column_step, const Inside& inside, T* to, int64_t step) {
  int lanes_of[Window::kSize];
  for (int j = 0; j < Window::kSize; ++j) lanes_of[j] = j >= inside.columns.begin && j < inside.columns.end ? inside.lanes : 0;
  const auto read = [&](int i, int j) {
    return load(x + i * row_step + j * column_step, i >= inside.rows.begin && i < inside.rows.end ? lanes_of[j] : 0);
  };
  map_pixels<F, Window>(read, to, step);
}

// `rows` rows from h on, pixels w .. w+pixels-1 and channels 0 .. lanes-1 from x on as strip[row][pixel][lane], zero outside.
template <class T>
void gather_strip(const Image<T>& image, const T* x, int64_t rows, int64_t h, int64_t w, int64_t pixels, int lanes, T* strip) {
  constexpr int kL = kLanes<T>;
  const Stride4& stride = image.stride;
  for (int64_t i = 0; i < rows; ++i) {
    const bool inside = uint64_t(h + i) < uint64_t(image.H);
    const T* row = x + (inside ? (h + i) * stride.h : 0);
    for (int64_t j = 0; j < pixels; j += kL) {
      const int n = pixels - j < kL ? int(pixels - j) : kL;
      const int lo = int(clamp(-w - j, 0, n)), hi = inside ? int(clamp(image.W - w - j, lo, n)) : lo;
      T* to = strip + (i * pixels + j) * kL;
      vec<T> block[kL];
#pragma GCC unroll 16
      for (int lane = 0; lane < kL; ++lane) {
        const T* from = row + lane * stride.c + (w + j) * stride.w;
        __builtin_prefetch(from + kL * stride.c);  // the next channels', each on a page of its own
        block[lane] = lane < lanes ? load_pixels(from, stride.w, lo, hi) : zero<T>();
      }
      transpose(block);
      for (int m = 0; m < n; ++m) store(to + m * kL, block[m]);
    }
  }
}

// The pixels of a channels-last window that its left neighbour does not have.
template <class F, class Window, class T>
FC_INLINE void prefetch_window(const T* window, const Stride4& stride) {
  for (int64_t i = 0; i < Window::kSize; ++i) {
#pragma GCC unroll 8
    for (int64_t j = Window::kSize - F::kOutput; j < Window::kSize; ++j) {
      __builtin_prefetch(window + i * stride.h + j * stride.w);
    }
  }
}

// Tiles first .. first+tiles of the batch, from the image to positions.
template <class F, class Window, class T>
void transform_windows(const Image<T>& batch, const Grid<F>& grid, int64_t first, int64_t tiles, const Positions<T>& to,
                       T* strip) {
  constexpr int64_t kL = kLanes<T>, kStep = F::kOutput, kSize = Window::kSize;
  grid.for_each_strip(first, first + tiles, [&](int64_t n, int64_t p, int64_t column, int64_t count, int64_t before) {
    const Image<T> image = batch.phase(n);
    const Stride4& stride = image.stride;
    const int64_t h = p - image.top, w = column * kStep - image.left;
    const T* x = image.at;
    T* v = to.at + before * to.tile_step;
    if (stride.c != 1) {
      const int64_t pixels = (count - 1) * kStep + kSize;
      for (int64_t c = 0; c < image.channels; c += kL) {
        gather_strip(image, x + c * stride.c, kSize, h, w, pixels, int(clamp(image.channels - c, 0, kL)), strip);
        for (int64_t t = 0; t < count; ++t) {
          map_window<F, Window>(strip + t * kStep * kL, pixels * kL, kL, v + t * to.tile_step + c, to.step);
        }
      }
      return;
    }
    const Range rows = {clamp(-h, 0, kSize), clamp(image.H - h, 0, kSize)};
    const bool rows_inside = rows.end - rows.begin == kSize;
    for (int64_t t = 0; t < count; ++t, v += to.tile_step) {
      const int64_t left = w + t * kStep;
      const bool inside = rows_inside && left >= 0 && left + kSize <= image.W;
      for (int64_t c = 0; c < image.channels; c += kL) {
        if (inside && c + kL <= image.channels) {
          const T* window = x + h * stride.h + left * stride.w + c;
          prefetch_window<F, Window>(window + kStep * stride.w, stride);
          map_window<F, Window>(window, stride.h, stride.w, v + c, to.step);
        } else {
          map_edge<F, Window>(
              x + h * stride.h + left * stride.w + c, stride.h, stride.w,
              {rows, {clamp(-left, 0, kSize), clamp(image.W - left, 0, kSize)}, int(clamp(image.channels - c, 0, kL))}, v + c,
              to.step);
        }
      }
    }
  });
}

}  // namespace fastconv::FASTCONV_TARGET

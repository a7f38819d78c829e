// The pixels that a filter gradient sums over, a chunk at a time: y as rows and x as columns of gemm_tile. Operands are stored as
// S and packed as compute_t<S>.
#pragma once

#include "cpu/blocks/columns.h"
#include "cpu/blocks/conv2d_geometry.h"
#include "cpu/blocks/gemm_tile.h"
#include "cpu/blocks/load_pixels.h"
#include "cpu/blocks/split.h"

namespace fastconv::FASTCONV_TARGET {

// Pixels between two visits to the sums. 512 pixels x 64 channels of floats are 128 KB; a visit then costs 48 of 6144 cycles'
// worth of loads and stores.
inline constexpr int64_t kMaxPixels = 512;
// And where the sums are in L2 anyway: half the packed pixels leave room for those fetched ahead.
inline constexpr int64_t kMaxPixelsAhead = 256;
inline constexpr int64_t kMaxSumsAhead = 512 * 1024;  // bytes
// Pixels from the packing of x to its prefetch: a pixel's columns are a few lines among many that other panels take.
inline constexpr int64_t kPixelsAhead = 8;
inline constexpr int64_t kRowsAhead = 2;  // the same for y, whose runs are longer

// The pixels of one chunk: `pixels` of the flat P*Q plane from `first` on, of `samples` samples from n on.
struct Chunk {
  int64_t n, samples, first, pixels;
};

struct Chunks {
  EvenSplit parts, samples;  // large planes are cut, small ones are taken several samples at a time

  FC_INLINE Chunks(const Conv2dProblem& a, int64_t pixels)
      : parts(a.P * a.Q, pixels), samples(a.N, a.P * a.Q >= pixels ? 1 : pixels / (a.P * a.Q)) {}
  template <class T>
  static Chunks of(const Conv2dProblem& a) {
    const int64_t sums = a.K * a.R * a.S * (a.C / a.groups) * int64_t(sizeof(T));
    return {a, a.P * a.Q > kMaxPixels && sums <= kMaxSumsAhead ? kMaxPixelsAhead : kMaxPixels};
  }
  FC_INLINE int64_t count() const { return parts.parts * samples.parts; }
  FC_INLINE int64_t largest() const { return parts.largest() * samples.largest(); }
  FC_INLINE Chunk at(int64_t i) const {
    const int64_t s = i / parts.parts, part = i % parts.parts;
    return {samples.begin(s), samples.size(s), parts.begin(part), parts.size(part)};
  }
};

// visit(n, p, q, length, pixels before) for every stretch of a chunk within one output row.
template <class Visit>
FC_INLINE void for_each_stretch(const Conv2dProblem& a, const Chunk& chunk, const Visit& visit) {
  for (int64_t sample = 0; sample < chunk.samples; ++sample) {
    int64_t p = chunk.first / a.Q, q = chunk.first % a.Q;
    for (int64_t done = 0; done < chunk.pixels;) {
      const int64_t left = chunk.pixels - done, length = a.Q - q < left ? a.Q - q : left;
      visit(chunk.n + sample, p, q, length, sample * chunk.pixels + done);
      done += length;
      q = 0, ++p;
    }
  }
}

// --- the rows: y, as [pixel][filters of a block], or in place where a plane of NCHW is one run of pixels

template <class S>
FC_INLINE bool rows_in_place(const Conv2dProblem& a) {
  return !kIsHalf<S> && a.y.w == 1 && a.y.h == a.Q;
}

// Elements from one pixel to the next: an odd number of lines puts neighbours into different cache sets. Where K is a power of
// two and y were read in place, all pixels of a tile would meet in one. (A panel for each tile would feed it at 142 GFLOP/s
// instead of 107, but writing 43 of them in turn takes 2 cycles an element, and up to four panels of columns use it.)
template <class T>
FC_INLINE int64_t row_step(int64_t filters) {
  return round_up(filters, 2 * kLanes<T>) + kLanes<T>;
}

template <class S>
void pack_rows(const Conv2dProblem& a, const Chunk& chunk, const S* y, int64_t filters, compute_t<S>* panel) {
  using T = compute_t<S>;
  const int64_t step = row_step<T>(filters);
  for_each_stretch(a, chunk, [&](int64_t n, int64_t p, int64_t q, int64_t length, int64_t before) {
    const S* from = y + n * a.y.n + p * a.y.h + q * a.y.w;
    T* to = panel + before * step;
    for (int64_t i = 0; i < length; ++i, from += a.y.w, to += step) {
      if (a.y.c == 1) {
        for (int64_t k = 0; k < filters; k += kLanes<T>) {
          __builtin_prefetch(from + k + kRowsAhead * a.y.w);
          store(to + k, load(from + k, int(clamp(filters - k, 0, kLanes<T>))));
        }
      } else {
        for (int64_t k = 0; k < filters; ++k) to[k] = wide(from[k * a.y.c]);
      }
    }
  });
}

// --- the columns: x under one tap, as [pixel][width]

// A "tap" is one filter position and its columns are channels, unless a vector of channels would be mostly empty: then a tap is
// one filter row and its columns are (s, c). A stem of three channels fills 21 of 32 lanes that way, not 3 of 16.
struct Columns {
  bool whole_rows;
  int64_t taps, count;  // columns of one tap

  template <class T>
  static Columns of(const Conv2dProblem& a) {
    const int64_t channels = a.C / a.groups;
    const bool one_run = a.x.c != 1 || (a.x.w == a.C && a.dilation_w == 1 && a.groups == 1);
    const bool whole_rows = a.S > 1 && channels < kLanes<T> && one_run;
    return {whole_rows, whole_rows ? a.R : a.R * a.S, whole_rows ? a.S * channels : channels};
  }
  // The columns of a tap, in vectors, cut into panels.
  template <class T>
  EvenSplit vectors() const {
    return {(count + kLanes<T> - 1) / kLanes<T>, GemmTile::kMaxVectors};
  }
};

// Columns first .. first+count of tap (r, s), where s is 0 for whole rows.
struct ColumnPart {
  bool whole_rows;
  int64_t r, s, first, count, width;
};

// One stretch of pixels of channels-last x: a pixel's columns are one run of memory.
template <class S>
void pack_runs(const Conv2dProblem& a, const ColumnPart& part, const S* x_row, int64_t q, int64_t length, const Range* inside,
               compute_t<S>* to) {
  constexpr int kL = kLanes<compute_t<S>>;
  const int64_t step = a.stride_w * a.x.w, channels = a.C / a.groups;
  const S* from = x_row + (q * a.stride_w - a.pad_left + part.s * a.dilation_w) * a.x.w + part.first;
  for (int64_t i = 0; i < length; ++i, from += step, to += part.width) {
    int64_t lo = 0, hi = part.count;
    if (part.whole_rows) {
      const int64_t left = (q + i) * a.stride_w - a.pad_left;
      lo = clamp(-left, 0, a.S) * channels - part.first;
      hi = clamp(a.W - left, 0, a.S) * channels - part.first;
      hi = hi < part.count ? hi : part.count;
    } else if (q + i < inside[part.s].begin || q + i >= inside[part.s].end) {
      hi = 0;
    }
    for (int64_t c = 0; c < part.width; c += kL) {
      __builtin_prefetch(from + c + kPixelsAhead * step);
      store(to + c, lo <= c && c + kL <= hi ? load(from + c)
                                            : load_range(from + c, int(clamp(lo - c, 0, kL)), int(clamp(hi - c, 0, kL))));
    }
  }
}

// One stretch of pixels of any other x: a column's pixels are evenly spaced. Blocks of them are transposed in registers.
template <class S>
void pack_transposed(const Conv2dProblem& a, const ColumnPart& part, const S* x_row, int64_t q, int64_t length,
                     const Range* inside, compute_t<S>* to) {
  using T = compute_t<S>;
  constexpr int kL = kLanes<T>;
  const int64_t step = a.stride_w * a.x.w, channels = a.C / a.groups;
  for (int64_t c = 0; c < part.width; c += kL) {
    const S* from[kL];  // where each column's pixel q = 0 would be
    Range pixels[kL];
    for (int lane = 0; lane < kL; ++lane) {
      const int64_t column = part.first + c + lane;
      const int64_t s = part.whole_rows ? column / channels : part.s, channel = part.whole_rows ? column % channels : column;
      const bool exists = c + lane < part.count;
      pixels[lane] = exists ? inside[s] : Range{0, 0};
      from[lane] = exists ? x_row + channel * a.x.c + (s * a.dilation_w - a.pad_left) * a.x.w : x_row;
    }
    for (int64_t i = 0; i < length; i += kL) {
      const int n = length - i < kL ? int(length - i) : kL;
      vec<T> block[kL];
#pragma GCC unroll 16
      for (int lane = 0; lane < kL; ++lane) {
        const int lo = int(clamp(pixels[lane].begin - q - i, 0, n)), hi = int(clamp(pixels[lane].end - q - i, lo, n));
        __builtin_prefetch(from[lane] + (q + i + 2 * kL) * step);
        block[lane] = load_pixels(from[lane] + (q + i) * step, step, lo, hi);
      }
      transpose(block);
      for (int m = 0; m < n; ++m) store(to + (i + m) * part.width + c, block[m]);
    }
  }
}

template <class S>
void pack_columns(const Conv2dProblem& a, const Chunk& chunk, const ColumnPart& part, const S* x, const Range* inside,
                  compute_t<S>* panel) {
  using T = compute_t<S>;
  for_each_stretch(a, chunk, [&](int64_t n, int64_t p, int64_t q, int64_t length, int64_t before) {
    T* to = panel + before * part.width;
    const int64_t h = p * a.stride_h - a.pad_top + part.r * a.dilation_h;
    if (uint64_t(h) >= uint64_t(a.H)) {
      for (int64_t i = 0; i < length * part.width; i += kLanes<T>) store(to + i, zero<T>());
      return;
    }
    const S* x_row = x + n * a.x.n + h * a.x.h;
    a.x.c == 1 ? pack_runs(a, part, x_row, q, length, inside, to) : pack_transposed(a, part, x_row, q, length, inside, to);
  });
}

}  // namespace fastconv::FASTCONV_TARGET

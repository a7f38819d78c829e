// Depthwise 3x3 weight gradient in NHWC on pixels where they lie, with stride 1 or 2 and at most one column of padding on a side.
//
// The lines of depthwise_wgrad_channels.cpp are a copy of x, which takes longer than nine FMAs for each of its pixels. Here a
// tile reads the pixels themselves, every vector of channels in turn before the next tile, as depthwise_pixels.cpp does.
#include "cpu/blocks/depthwise_wgrad.h"
#include "cpu/blocks/parallel.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- tile: one vector of channels, the nine sums of its filter in registers, and a run of pixels of one row of y or of two.
//
// A column of x is loaded once and serves three pixels; with two rows of y, which share two of their rows of x, 18 FMAs have six
// loads instead of eight, and x comes from L2 twice instead of three times. Nine sums, four rows of three columns and two of y
// are 23 of 32 registers.
inline constexpr int kTaps = 9;
// Of a run. 28 and 14 are 1.03 to 1.07 times as slow on maps of 56 and 112, and 1.1 to 1.2 on 8 images.
inline constexpr int kMostPixels = 56;

// Sums have three levels, so that the error grows with none of the row, the height and the batch alone: registers for a tile go
// on from the sums of up to kChain pixels, then all rows of a sample, then all samples of the piece.
inline constexpr int64_t kChain = 128;

// A block of channels is this long at least: 512 bytes of each pixel, which prefetchers follow.
inline constexpr int64_t kFewestVectors = 8;

template <class T>
struct PixelProduct {
  const T* x;  // of the first pixel's window: its first row that lies inside, its first column whether or not
  int64_t x_row, x_pixel;
  const T* y;
  int64_t y_row, y_pixel, pixels;
  bool left, right;  // the first column of the first window, and the last of the last, is padding
  int64_t vectors;
  T* sums;  // [vector][tap, then the bias][lane], from the first row of the filter that lies inside
};

inline constexpr int64_t kSums = kTaps + 1;  // of a vector

// --- transform: none

// --- multiply

// kRows: of the filter that lie inside x. kOutputs: rows of y.
template <class T, int kRows, int kStride, int kOutputs>
void multiply_pixels(const PixelProduct<T>& a) {
  constexpr int kL = kLanes<T>, kLines = kRows + (kOutputs - 1) * kStride;
  const int64_t vectors = a.vectors, pixels = a.pixels, x_row = a.x_row, x_pixel = a.x_pixel, y_row = a.y_row;
  for (int64_t v = 0; v < vectors; ++v) {
    const T* x = a.x + v * kL;
    const T* y = a.y + v * kL;
    T* const sums = a.sums + v * kSums * kL;
    vec<T> sum[kRows][3], window[kLines][3];
#pragma GCC unroll 9
    for (int t = 0; t < 3 * kRows; ++t) sum[t / 3][t % 3] = load(sums + t * kL);
#pragma GCC unroll 4
    for (int line = 0; line < kLines; ++line) {
      window[line][0] = a.left ? zero<T>() : load(x + line * x_row);
      if (kStride == 1) window[line][1] = load(x + line * x_row + x_pixel);
    }
    // One pixel, whose window begins in column `first` of the registers; the columns that it does not share are loaded.
    const auto multiply = [&](int first, bool last) __attribute__((always_inline)) {
      vec<T> dy[kOutputs];
#pragma GCC unroll 2
      for (int i = 0; i < kOutputs; ++i) dy[i] = load(y + i * y_row);
#pragma GCC unroll 4
      for (int line = 0; line < kLines; ++line) {
        const T* from = x + line * x_row;
        if (kStride == 2) window[line][(first + 1) % 3] = load(from + x_pixel);
        window[line][(first + 2) % 3] = last && a.right ? zero<T>() : load(from + 2 * x_pixel);
      }
#pragma GCC unroll 2
      for (int i = 0; i < kOutputs; ++i) {
#pragma GCC unroll 9
        for (int t = 0; t < 3 * kRows; ++t)
          sum[t / 3][t % 3] = fma(dy[i], window[t / 3 + i * kStride][(first + t % 3) % 3], sum[t / 3][t % 3]);
      }
      x += kStride * x_pixel, y += a.y_pixel;
    };
    // The column that the next pixel begins with is this one's second or third.
    int64_t q = 0;
    for (; q + 3 < pixels; q += 3) {
#pragma GCC unroll 3
      for (int i = 0; i < 3; ++i) multiply(i * kStride % 3, false);
    }
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) {
      if (q + i < pixels) multiply(i * kStride % 3, q + i + 1 == pixels);
    }
#pragma GCC unroll 9
    for (int t = 0; t < 3 * kRows; ++t) store(sums + t * kL, sum[t / 3][t % 3]);
  }
}

template <class T>
void add_bias(const PixelProduct<T>& a, T* sums) {
  constexpr int kL = kLanes<T>;
  for (int64_t v = 0; v < a.vectors; ++v) {
    T* const to = sums + (v * kSums + kTaps) * kL;
    vec<T> sum = load(to);
    for (int64_t q = 0; q < a.pixels; ++q) sum = sum + load(a.y + v * kL + q * a.y_pixel);
    store(to, sum);
  }
}

template <class T>
void multiply_rows(const PixelProduct<T>& a, int64_t stride, int64_t rows, int64_t outputs) {
  if (outputs == 2) return multiply_pixels<T, 3, 1, 2>(a);
  if (stride == 2) {
    return rows == 3   ? multiply_pixels<T, 3, 2, 1>(a)
           : rows == 2 ? multiply_pixels<T, 2, 2, 1>(a)
                       : multiply_pixels<T, 1, 2, 1>(a);
  }
  return rows == 3 ? multiply_pixels<T, 3, 1, 1>(a) : rows == 2 ? multiply_pixels<T, 2, 1, 1>(a) : multiply_pixels<T, 1, 1, 1>(a);
}

template <class T>
struct Layout {
  int64_t vectors;
  EvenSplit pieces, blocks;  // of the N*P rows of y, of the vectors
  int64_t sums;              // elements of a block's sums

  FC_INLINE explicit Layout(const Conv2dProblem& a)
      : vectors(a.K / kLanes<T>),
        pieces(row_pieces(a.N * a.P, 1, 1)),
        blocks(vectors,
               clamp(vectors * pieces.parts / kWantedTasks, kFewestVectors < vectors ? kFewestVectors : vectors, vectors)),
        sums(blocks.largest() * kSums * kLanes<T>) {}
  FC_INLINE int64_t partial() const { return vectors * kSums * kLanes<T>; }
  FC_INLINE int64_t partial_bytes() const { return round_up(pieces.parts * partial() * int64_t(sizeof(T)), 64); }
};

// What one thread works in.
template <class T>
struct Scratch {
  T *row_sums, *sample_sums;

  FC_INLINE Scratch(const Layout<T>& layout, Arena& arena)
      : row_sums(arena.take<T>(layout.sums)), sample_sums(arena.take<T>(layout.sums)) {}
};

// Sums rows begin..end of the N*P rows of y, for `vectors` vectors of channels from k on, into `to`.
template <class T>
void sum_piece(const Conv2dProblem& a, const Conv2dArgs& args, const Scratch<T>& scratch, int64_t k, int64_t vectors,
               int64_t begin, int64_t end, T* to) {
  const int64_t sums = vectors * kSums * kLanes<T>, stride = a.stride_w;
  const EvenSplit tiles(a.Q, kMostPixels);
  for (int64_t i = 0; i < sums; ++i) scratch.row_sums[i] = scratch.sample_sums[i] = to[i] = T(0);
  PixelProduct<T> tile;
  tile.x_row = a.x.h, tile.x_pixel = a.x.w, tile.y_row = a.y.h, tile.y_pixel = a.y.w, tile.vectors = vectors;
  for (int64_t row = begin, chain = 0; row < end;) {
    const int64_t n = row / a.P, p = row - n * a.P, h = p * a.stride_h - a.pad_top;
    const Range r = taps_inside(3, 1, h, a.H);
    const int64_t rows = r.end > r.begin ? r.end - r.begin : 0;
    const bool two = stride == 1 && rows == 3 && h + 4 <= a.H && p + 1 < a.P && row + 1 < end;
    const T* const x = static_cast<const T*>(args.x) + n * a.x.n + (h + r.begin) * a.x.h + k;
    const T* const y = static_cast<const T*>(args.y) + n * a.y.n + p * a.y.h + k;
    for (int64_t part = 0; part < tiles.parts; ++part) {
      const int64_t q = tiles.begin(part);
      tile.x = x + (q * stride - a.pad_left) * a.x.w;
      tile.y = y + q * a.y.w;
      tile.pixels = tiles.size(part);
      tile.left = q == 0 && a.pad_left == 1;
      tile.right = (q + tile.pixels - 1) * stride - a.pad_left + 3 > a.W;
      tile.sums = scratch.row_sums + r.begin * 3 * kLanes<T>;
      if (rows > 0) multiply_rows(tile, stride, rows, two ? 2 : 1);
      for (int i = 0; a.epilogue.bias && i <= two; ++i, tile.y += a.y.h) add_bias(tile, scratch.row_sums);
    }
    row += two ? 2 : 1, chain += two ? 2 * a.Q : a.Q;
    const bool sample_ends = row == end || row % a.P == 0;
    if (chain >= kChain || sample_ends) move_sums(scratch.row_sums, scratch.sample_sums, sums), chain = 0;
    if (sample_ends) move_sums(scratch.sample_sums, to, sums);
  }
}

}  // namespace

template <class T>
bool depthwise_wgrad_in_place(const Conv2dProblem& a) {
  if (kVectorRegisters < 32 || !depthwise_over_channels(a)) return false;
  if (a.C != a.groups || a.K != a.C || a.C % kLanes<T> != 0 || a.R != 3 || a.S != 3) return false;
  if (a.dilation_h != 1 || a.dilation_w != 1 || a.stride_h != a.stride_w || a.stride_w > 2) return false;
  return (a.pad_left == 0 || a.pad_left == 1) && (a.Q - 1) * a.stride_w - a.pad_left + 2 <= a.W;
}

// --- run: one task is one block of channels and one piece of the rows.
template <class T>
void depthwise_wgrad_pixels_run(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context) {
  const Layout<T> layout(a);
  const int64_t pieces = layout.pieces.parts, vector_sums = kSums * kLanes<T>;
  Arena counter(nullptr);
  const Scratch<T> counted(layout, counter);
  T* const partials = static_cast<T*>(context.workspace);
  parallel_ranges(context, layout.blocks.parts * pieces, [&](int thread, int64_t begin, int64_t end) {
    Arena arena(static_cast<char*>(context.workspace) + layout.partial_bytes() + thread * counter.used());
    const Scratch<T> scratch(layout, arena);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task / pieces, piece = task % pieces, first = layout.pieces.begin(piece);
      const int64_t v = layout.blocks.begin(block);
      sum_piece(a, args, scratch, v * kLanes<T>, layout.blocks.size(block), first, first + layout.pieces.size(piece),
                partials + piece * layout.partial() + v * vector_sums);
    }
  });
  parallel_ranges(context, layout.vectors, [&](int, int64_t begin, int64_t end) {
    for (int64_t v = begin; v < end; ++v) {
      T* const sums = partials + v * vector_sums;
      for (int64_t piece = 1; piece < pieces; ++piece) move_sums(sums + piece * layout.partial(), sums, vector_sums);
      write_channel_gradient(a, args, v, sums);
    }
  });
}

template <class T>
int64_t depthwise_wgrad_pixels_workspace(const Conv2dProblem& a, const Machine& machine) {
  const Layout<T> layout(a);
  Arena counter(nullptr);
  const Scratch<T> counted(layout, counter);
  return layout.partial_bytes() + machine.threads * counter.used();
}

#define FC_DEPTHWISE_WGRAD_PIXELS(T)                                                                    \
  template bool depthwise_wgrad_in_place<T>(const Conv2dProblem&);                                      \
  template void depthwise_wgrad_pixels_run<T>(const Conv2dProblem&, const Conv2dArgs&, const Context&); \
  template int64_t depthwise_wgrad_pixels_workspace<T>(const Conv2dProblem&, const Machine&);
FC_DEPTHWISE_WGRAD_PIXELS(float)
FC_DEPTHWISE_WGRAD_PIXELS(double)
#undef FC_DEPTHWISE_WGRAD_PIXELS

}  // namespace fastconv::FASTCONV_TARGET

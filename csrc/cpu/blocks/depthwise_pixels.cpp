// Depthwise forward in NHWC on pixels where they lie: 3x3 filters with stride 1 or 2, and 5x5 with stride 2. (5x5 with stride 1
// is 1.2 times as fast from lines: its weights do not fit in the registers, and lines serve all rows of a tile.) Also 1x1, which
// is a factor and a summand for each channel, and what the input gradient of stride 2 is made of: filters of one to three rows
// and columns.
//
// The lines of depthwise_channels.cpp are a copy of x, which is a third to a half of a small filter's time. Here a tile reads the
// pixels themselves, and every vector of channels takes its turn on one tile of pixels before the next tile: the window of 14
// pixels is one run of memory for each row of the filter, which 96 to 576 channels keep in L1. The first and last columns, whose
// filters stick out, are computed pixel by pixel.
#include "cpu/blocks/activation.h"
#include "cpu/blocks/channel_weights.h"
#include "cpu/blocks/depthwise.h"
#include "cpu/blocks/parallel.h"
#include "cpu/blocks/split.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- tile: 14, 7 or 5 pixels of one output row x one vector of channels, for all vectors.
//
// 14 sums, 9 weights and an input are 24 of 32 registers; the 25 weights of 5x5 are loaded row by row. Five because 3x3 filters
// on 7x7 maps have five columns between the first and the last.
template <class T>
struct PixelTile {
  const T* x;  // of the first pixel's window: its first row and column that lie inside
  int64_t x_row, x_pixel;
  int64_t rows, columns;  // of the window that lie inside
  const T* w;             // [vector][R][S][lane], from the first row and column that lie inside
  int64_t w_row, w_vector;
  const T* bias;  // [vector][lane]
  T* y;
  int64_t y_pixel;
  const T* residual;  // or nullptr, laid out as y is
  int64_t vectors;
  Activation activation;
};

// --- multiply

// sum + residual, activated, stored.
template <class T, int kPixels>
FC_INLINE void finish_pixels(const PixelTile<T>& a, vec<T> (&sum)[kPixels], int64_t offset) {
  const int64_t step = a.y_pixel;
  if (a.residual) {
#pragma GCC unroll 16
    for (int i = 0; i < kPixels; ++i) sum[i] = sum[i] + load(a.residual + offset + i * step);
  }
  T* y = a.y + offset;
  if (a.activation == Activation::relu) {
#pragma GCC unroll 16
    for (int i = 0; i < kPixels; ++i) sum[i] = activate(Activation::relu, sum[i]);
  } else if (a.activation == Activation::relu6) {
#pragma GCC unroll 16
    for (int i = 0; i < kPixels; ++i) sum[i] = activate(Activation::relu6, sum[i]);
  } else if (a.activation != Activation::none) {
    // One body for all pixels: it has an exponential.
    vec<T> kept[kPixels];
#pragma GCC unroll 16
    for (int i = 0; i < kPixels; ++i) kept[i] = sum[i];
    for (int i = 0; i < kPixels; ++i) store(y + i * step, activate(a.activation, kept[i]));
    return;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kPixels; ++i) store(y + i * step, sum[i]);
}

// Pixels whose windows lie inside from left to right. kWhole: from top to bottom, too.
template <class T, int kPixels, int kR, int kS, int kStride, bool kWhole>
void multiply_pixels(const PixelTile<T>& a) {
  constexpr int kL = kLanes<T>, kColumns = (kPixels - 1) * kStride + kS;
  const int64_t vectors = a.vectors, rows = kWhole ? kR : a.rows, x_row = a.x_row, x_pixel = a.x_pixel;
  const T* x = a.x;
  const T* w = a.w;
  for (int64_t v = 0; v < vectors; ++v, x += kL, w += a.w_vector) {
    vec<T> sum[kPixels];
    const vec<T> bias = load(a.bias + v * kL);
#pragma GCC unroll 16
    for (int i = 0; i < kPixels; ++i) sum[i] = bias;
    const auto row = [&](int64_t r) __attribute__((always_inline)) {
      const T* line = x + r * x_row;
      vec<T> weight[kS];
#pragma GCC unroll 8
      for (int s = 0; s < kS; ++s) weight[s] = load(w + (r * kS + s) * kL);
#pragma GCC unroll 64
      for (int column = 0; column < kColumns; ++column, line += x_pixel) {
        vec<T> value = load(line);
#ifdef __x86_64__
        asm("" : "+v"(value.v));  // one load and not one for each of its FMAs, as in depthwise_channels.cpp
#endif
#pragma GCC unroll 16
        for (int i = 0; i < kPixels; ++i) {
          const int s = column - i * kStride;
          if (s >= 0 && s < kS) sum[i] = fma(value, weight[s], sum[i]);
        }
      }
    };
    if constexpr (kWhole) {
#pragma GCC unroll 8
      for (int r = 0; r < kR; ++r) row(r);
    } else {
      for (int64_t r = 0; r < rows; ++r) row(r);
    }
    finish_pixels(a, sum, v * kL);
  }
}

// One pixel whose window may stick out on any side.
template <class T>
__attribute__((noinline)) void multiply_edge(const PixelTile<T>& a) {
  constexpr int kL = kLanes<T>;
  for (int64_t v = 0; v < a.vectors; ++v) {
    vec<T> sum[1] = {load(a.bias + v * kL)};
    for (int64_t r = 0; r < a.rows; ++r) {
      const T* line = a.x + r * a.x_row + v * kL;
      const T* w = a.w + r * a.w_row + v * a.w_vector;
      for (int64_t s = 0; s < a.columns; ++s) sum[0] = fma(load(line + s * a.x_pixel), load(w + s * kL), sum[0]);
    }
    finish_pixels(a, sum, v * kL);
  }
}

template <class T>
using TileFunction = void (*)(const PixelTile<T>&);

// Filters of which there are tiles.
FC_INLINE bool has_tile(const Conv2dProblem& a) {
  if (a.stride_h != a.stride_w) return false;
  if (a.stride_w == 2) return a.R == a.S && (a.R == 3 || a.R == 5);
  return a.stride_w == 1 && a.R >= 1 && a.R <= 3 && a.S >= 1 && a.S <= 3;
}

template <class T, int kPixels, bool kWhole, int kS>
TileFunction<T> choose_rows(int64_t R) {
  if (R == 1) return multiply_pixels<T, kPixels, 1, kS, 1, kWhole>;
  return R == 2 ? multiply_pixels<T, kPixels, 2, kS, 1, kWhole> : multiply_pixels<T, kPixels, 3, kS, 1, kWhole>;
}

template <class T, int kPixels, bool kWhole>
TileFunction<T> choose_tile(const Conv2dProblem& a) {
  if (a.stride_w == 2)
    return a.R == 5 ? multiply_pixels<T, kPixels, 5, 5, 2, kWhole> : multiply_pixels<T, kPixels, 3, 3, 2, kWhole>;
  if (a.S == 1) return choose_rows<T, kPixels, kWhole, 1>(a.R);
  return a.S == 2 ? choose_rows<T, kPixels, kWhole, 2>(a.R) : choose_rows<T, kPixels, kWhole, 3>(a.R);
}

template <class T, bool kWhole>
TileFunction<T> choose_tile(const Conv2dProblem& a, int64_t pixels) {
  return pixels == 14 ? choose_tile<T, 14, kWhole>(a) : pixels == 7 ? choose_tile<T, 7, kWhole>(a) : choose_tile<T, 5, kWhole>(a);
}

// Columns of y whose windows lie inside x from left to right.
FC_INLINE Range inner_columns(const Conv2dProblem& a) {
  const int64_t begin = clamp(ceil_div(a.pad_left, a.stride_w), 0, a.Q);
  return {begin, clamp((a.W - a.S + a.pad_left) / a.stride_w + 1, begin, a.Q)};
}

// The tile that computes the fewest of `columns` twice, of equals the widest; 0 where none is so narrow.
FC_INLINE int64_t tile_pixels(int64_t columns) {
  int64_t best = 0, least = 0;
  constexpr int64_t kWidths[] = {14, 7, 5};
  for (const int64_t pixels : kWidths) {
    const int64_t computed = round_up(columns, pixels);
    if (columns >= pixels && (best == 0 || computed < least)) best = pixels, least = computed;
  }
  return best;
}

template <class T>
struct Scratch {
  T *weights, *no_bias;

  FC_INLINE Scratch(const Conv2dProblem& a, Arena& arena)
      : weights(arena.take<T>(a.K * a.R * a.S)), no_bias(arena.take<T>(a.epilogue.bias ? 0 : a.K)) {}
};

}  // namespace

template <class T>
bool depthwise_in_place(const Conv2dProblem& a) {
  if (kVectorRegisters < 32 || !depthwise_over_channels(a)) return false;
  if (a.C != a.groups || a.K != a.C || a.C % kLanes<T> != 0) return false;
  if (!has_tile(a) || a.dilation_h * a.dilation_w != 1 || a.pad_left < 0 || a.W < a.S) return false;
  // Pixels whose distance is a multiple of 1024 bytes meet in four sets of the L1, which does not keep the rows that a tile
  // shares with the tile below: lines do, and are as fast or 1.2 times as fast. With stride 2, which shares one row of three, and
  // in its phases, which are at most 2x2, pixels in place are 1.4 and 2.0 times as fast (256@28, Zen 5).
  if (a.stride_w == 1 && a.R * a.S > 4 && a.x.w * int64_t(sizeof(T)) % 1024 == 0) return false;
  const Range inner = inner_columns(a);
  return tile_pixels(inner.end - inner.begin) > 0 && 2 * (inner.end - inner.begin) > a.Q;
}

// --- run: one task is one row of y
template <class T>
void depthwise_pixels_run(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context) {
  constexpr int kL = kLanes<T>;
  const Range inner = inner_columns(a);
  const int64_t pixels = tile_pixels(inner.end - inner.begin), vectors = a.K / kL;
  const TileFunction<T> multiply_whole = choose_tile<T, true>(a, pixels), multiply_clipped = choose_tile<T, false>(a, pixels);
  Arena counter(nullptr);
  const Scratch<T> counted(a, counter);
  parallel_ranges(context, a.N * a.P, [&](int thread, int64_t begin, int64_t end) {
    Arena arena(static_cast<char*>(context.workspace) + thread * counter.used());
    const Scratch<T> scratch(a, arena);
    pack_channel_weights(a, static_cast<const T*>(args.w), 0, vectors, scratch.weights);
    for (int64_t k = 0; !a.epilogue.bias && k < a.K; ++k) scratch.no_bias[k] = T(0);
    PixelTile<T> tile;
    tile.x_row = a.x.h, tile.x_pixel = a.x.w;
    tile.w_row = a.S * kL, tile.w_vector = a.R * a.S * kL;
    tile.bias = a.epilogue.bias ? static_cast<const T*>(args.bias) : scratch.no_bias;
    tile.y_pixel = a.y.w, tile.vectors = vectors, tile.activation = a.epilogue.activation;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / a.P, p = task % a.P, h = p * a.stride_h - a.pad_top;
      const Range r = taps_inside(a.R, 1, h, a.H);
      tile.rows = r.end > r.begin ? r.end - r.begin : 0;
      const T* const x = static_cast<const T*>(args.x) + n * a.x.n + (h + r.begin) * a.x.h;
      const T* const w = scratch.weights + r.begin * tile.w_row;
      // The tile or the pixel whose first is q, from its tap s on.
      const auto place = [&](int64_t q, Range s) __attribute__((always_inline)) {
        const int64_t offset = n * a.y.n + p * a.y.h + q * a.y.w;
        tile.x = x + (q * a.stride_w - a.pad_left + s.begin) * a.x.w;
        tile.w = w + s.begin * kL;
        tile.columns = s.end > s.begin ? s.end - s.begin : 0;
        tile.y = static_cast<T*>(args.y) + offset;
        tile.residual = a.epilogue.residual ? static_cast<const T*>(args.residual) + offset : nullptr;
      };
      const auto edges = [&](int64_t first, int64_t last) {
        for (int64_t q = first; q < last; ++q) {
          place(q, taps_inside(a.S, 1, q * a.stride_w - a.pad_left, a.W));
          multiply_edge(tile);
        }
      };
      edges(0, inner.begin);
      // The last tile begins where it ends with the row: some pixels are computed twice, to the same bits.
      for (int64_t q = inner.begin; q < inner.end; q += pixels) {
        place(q + pixels <= inner.end ? q : inner.end - pixels, {0, a.S});
        (tile.rows == a.R ? multiply_whole : multiply_clipped)(tile);
      }
      edges(inner.end, a.Q);
    }
  });
}

template <class T>
int64_t depthwise_pixels_workspace(const Conv2dProblem& a, const Machine& machine) {
  Arena counter(nullptr);
  const Scratch<T> counted(a, counter);
  return machine.threads * counter.used();
}

#define FC_DEPTHWISE_PIXELS(T)                                                                    \
  template bool depthwise_in_place<T>(const Conv2dProblem&);                                      \
  template void depthwise_pixels_run<T>(const Conv2dProblem&, const Conv2dArgs&, const Context&); \
  template int64_t depthwise_pixels_workspace<T>(const Conv2dProblem&, const Machine&);
FC_DEPTHWISE_PIXELS(float)
FC_DEPTHWISE_PIXELS(double)
#undef FC_DEPTHWISE_PIXELS

}  // namespace fastconv::FASTCONV_TARGET

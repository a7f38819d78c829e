// Depthwise weight gradient with vectors along the row (NCHW, and whatever else is not NHWC).
#include "cpu/blocks/depthwise_lines.h"
#include "cpu/blocks/depthwise_wgrad.h"
#include "cpu/blocks/parallel.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- tile: one channel, kRows rows of y, the sums of a tile of taps in registers (TapTile), each with one lane for every column
// modulo the lanes.
//
// Each x meets up to three of the four rows of y, so the unaligned loads, two cycles each where they cross a line, are 18 for 36
// FMAs of a 3x3. 9 sums + 4 rows of y + 1 input are 14 of 16 registers. Levels of sums: a tile, then a sample, then the piece;
// lanes last.
constexpr int kRows = 4;

template <class T>
struct TileProduct {
  const T* const* lines;   // of x, [row from the first that the tile needs]
  const int64_t* columns;  // [s]: where its input starts in a line
  int64_t R, S, stride_h, dilation_h;
  const T* y;
  int64_t y_row, y_column, q_count;
  int rows;  // of y that exist
  bool bias;
  T* sums;  // [R][S][lane], then [lane] of the bias
};

// --- transform: only the copied lines. Kept out of the tile: one load for each lane would be most of its code.
template <class T>
__attribute__((noinline)) void gather_y(const T* y, int64_t step, int lanes, vec<T>& to) {
  to = load_strided(y, step, lanes);
}

template <class T, bool kTail>
FC_INLINE vec<T> load_y(const TileProduct<T>& a, int b, int64_t q, int lanes) {
  if (b >= a.rows) return zero<T>();
  const T* y = a.y + b * a.y_row + q * a.y_column;
  if (a.y_column != 1) {
    vec<T> gathered;
    gather_y(y, a.y_column, lanes, gathered);
    return gathered;
  }
  return kTail ? load(y, lanes) : load(y);
}

// --- multiply. kDense: stride and dilation of the rows are 1, so that rows of x serve several rows of y.
template <class T, int kTapRows, int kTapColumns, bool kDense>
FC_INLINE void multiply_taps(const TileProduct<T>& a, int64_t r0, int64_t s0) {
  constexpr int kL = kLanes<T>;
  // A tap on its own is one chain; the rows of y make it four.
  constexpr int kChains = kTapRows * kTapColumns == 1 ? kRows : 1;
  vec<T> sum[kChains][kTapRows][kTapColumns];
#pragma GCC unroll 8
  for (int c = 0; c < kChains; ++c) {
#pragma GCC unroll 8
    for (int r = 0; r < kTapRows; ++r) {
#pragma GCC unroll 8
      for (int s = 0; s < kTapColumns; ++s) sum[c][r][s] = zero<T>();
    }
  }
  const T* const* lines = a.lines + r0 * a.dilation_h;
  // Past the last column y is zero, and so must x be: zero times an infinity of the next column would be NaN.
  const auto step = [&]<bool kTail>(int64_t q, int lanes) __attribute__((always_inline)) {
    vec<T> dy[kRows];
#pragma GCC unroll 8
    for (int b = 0; b < kRows; ++b) dy[b] = load_y<T, kTail>(a, b, q, lanes);
    const auto load_x = [&](const T* line, int s) __attribute__((always_inline)) {
      const T* x = line + a.columns[s0 + s] + q;
      return kTail ? load(x, lanes) : load(x);
    };
    if constexpr (kDense) {
#pragma GCC unroll 16
      for (int i = 0; i < kRows + kTapRows - 1; ++i) {
#pragma GCC unroll 8
        for (int s = 0; s < kTapColumns; ++s) {
          const vec<T> x = load_x(lines[i], s);
#pragma GCC unroll 8
          for (int r = 0; r < kTapRows; ++r) {
            if (i - r >= 0 && i - r < kRows) sum[0][r][s] = fma(dy[i - r], x, sum[0][r][s]);
          }
        }
      }
    } else {
#pragma GCC unroll 8
      for (int b = 0; b < kRows; ++b) {
#pragma GCC unroll 8
        for (int r = 0; r < kTapRows; ++r) {
          const T* line = lines[b * a.stride_h + r * a.dilation_h];
#pragma GCC unroll 8
          for (int s = 0; s < kTapColumns; ++s) {
            sum[b % kChains][r][s] = fma(dy[b], load_x(line, s), sum[b % kChains][r][s]);
          }
        }
      }
    }
  };
  int64_t q = 0;
  for (; q + kL <= a.q_count; q += kL) step.template operator()<false>(q, kL);
  if (q < a.q_count) step.template operator()<true>(q, int(a.q_count - q));
#pragma GCC unroll 8
  for (int r = 0; r < kTapRows; ++r) {
#pragma GCC unroll 8
    for (int s = 0; s < kTapColumns; ++s) {
      T* to = a.sums + ((r0 + r) * a.S + s0 + s) * kL;
      vec<T> total = sum[0][r][s];
#pragma GCC unroll 8
      for (int c = 1; c < kChains; ++c) total = total + sum[c][r][s];
      store(to, load(to) + total);
    }
  }
}

template <class T, int kS, bool kDense>
void multiply_tile(const TileProduct<T>& a) {
  constexpr int kL = kLanes<T>;
  for_each_tap_tile<kS>(0, a.R, a.S, [&]<int kTapRows, int kTapColumns>(int64_t r, int64_t s) {
    multiply_taps<T, kTapRows, kTapColumns, kDense && kTapRows * kTapColumns != 1>(a, r, s);
  });
  if (a.bias) {
    vec<T> sum = zero<T>();
    for (int64_t q = 0; q < a.q_count; q += kL) {
      const int lanes = a.q_count - q < kL ? int(a.q_count - q) : kL;
      for (int b = 0; b < kRows; ++b) sum = sum + load_y<T, true>(a, b, q, lanes);
    }
    T* to = a.sums + a.R * a.S * kL;
    store(to, load(to) + sum);
  }
}

template <class T>
using TileFunction = void (*)(const TileProduct<T>&);

// What one thread works in.
template <class T>
struct Scratch {
  T* sample_sums;  // [filter of the group][R*S + 1][lane]
  T* piece_sums;   // the same
  int64_t* columns;
  LineRing<T> ring;

  FC_INLINE Scratch(const Conv2dProblem& a, const RowBlocks<T>& blocks, Arena& arena)
      : sample_sums(arena.take<T>(a.K / a.groups * (a.R * a.S + 1) * kLanes<T>)),
        piece_sums(arena.take<T>(a.K / a.groups * (a.R * a.S + 1) * kLanes<T>)),
        columns(arena.take<int64_t>(a.S)),
        ring(blocks.window, blocks.line_size(a), arena) {}
};

template <class T>
struct Layout {
  RowBlocks<T> blocks;
  int64_t tiles;       // of kRows rows in a sample
  EvenSplit pieces;    // of the N * tiles
  int64_t filters;     // of one group
  int64_t sums;        // of one filter: R*S taps and the bias
  int64_t per_thread;  // bytes

  FC_INLINE explicit Layout(const Conv2dProblem& a)
      : blocks(a, kRows),
        tiles((a.P + kRows - 1) / kRows),
        pieces(row_pieces(a.N * tiles, kRows, a.groups)),
        filters(a.K / a.groups),
        sums(a.R * a.S + 1) {
    Arena arena(nullptr);
    Scratch<T>(a, blocks, arena);
    per_thread = arena.used();
  }
  FC_INLINE int64_t partial_bytes(const Conv2dProblem& a) const {
    return round_up(pieces.parts * a.K * sums * int64_t(sizeof(T)), 64);
  }
};

// Sums tiles begin..end of the N * tiles of one group into scratch.piece_sums.
template <class T>
void sum_piece(const Conv2dProblem& a, const Conv2dArgs& args, const Layout<T>& layout, Scratch<T>& scratch,
               TileFunction<T> multiply, int64_t g, int64_t begin, int64_t end) {
  const RowBlocks<T>& blocks = layout.blocks;
  const int64_t filters = layout.filters, sums = layout.sums * kLanes<T>;
  for (int64_t i = 0; i < filters * sums; ++i) scratch.sample_sums[i] = scratch.piece_sums[i] = T(0);
  for (int64_t first = begin; first < end;) {
    const int64_t n = divide(first, layout.tiles), base = n * layout.tiles;
    const int64_t last = end - base < layout.tiles ? end - base : layout.tiles;
    for (int64_t q0 = 0; q0 < a.Q; q0 += blocks.q_size) {
      scratch.ring.clear();
      for (int64_t tile = first - base; tile < last; ++tile) {
        const int64_t p0 = tile * kRows;
        TileProduct<T> product;
        product.rows = a.P - p0 < kRows ? int(a.P - p0) : kRows;
        scratch.ring.fetch_tile(a, p0, product.rows, [&](const int64_t* h, T* const* to, int64_t count) {
          const T* x = static_cast<const T*>(args.x) + n * a.x.n + g * a.x.c;
          copy_rows(a, x, h, to, count, q0 * a.stride_w - a.pad_left, blocks.columns);
        });
        product.lines = scratch.ring.lines, product.columns = scratch.columns;
        product.R = a.R, product.S = a.S, product.stride_h = a.stride_h, product.dilation_h = a.dilation_h;
        product.y_row = a.y.h, product.y_column = a.y.w;
        product.q_count = a.Q - q0 < blocks.q_size ? a.Q - q0 : blocks.q_size;
        product.bias = a.epilogue.bias;
        for (int64_t f = 0; f < filters; ++f) {
          product.y = static_cast<const T*>(args.y) + n * a.y.n + (g * filters + f) * a.y.c + p0 * a.y.h + q0 * a.y.w;
          product.sums = scratch.sample_sums + f * sums;
          multiply(product);
        }
      }
    }
    move_sums(scratch.sample_sums, scratch.piece_sums, filters * sums);
    first = base + last;
  }
}

// dw and the bias gradient of filter k.
template <class T>
FC_INLINE void write_gradient(const Conv2dProblem& a, const Conv2dArgs& args, int64_t g, int64_t f, int64_t k, const T* sums) {
  T* w = static_cast<T*>(args.w) + g * a.w.g + f * a.w.k;
  for (int64_t r = 0; r < a.R; ++r) {
    for (int64_t s = 0; s < a.S; ++s) w[r * a.w.r + s * a.w.s] = sums[r * a.S + s];
  }
  if (a.epilogue.bias) static_cast<T*>(args.bias)[k] = sums[a.R * a.S];
}

}  // namespace

// --- run: one task is one group and one piece of its tiles.
template <class T>
void depthwise_wgrad_rows_run(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context) {
  const Layout<T> layout(a);
  TileFunction<T> multiply = nullptr;
  with_tap_tile(a.S, [&]<int kS>() {
    multiply = a.stride_h == 1 && a.dilation_h == 1 ? multiply_tile<T, kS, true> : multiply_tile<T, kS, false>;
  });
  const int64_t pieces = layout.pieces.parts, filters = layout.filters;
  T* partials = static_cast<T*>(context.workspace);  // [piece][K][sums]
  parallel_ranges(context, a.groups * pieces, [&](int thread, int64_t begin, int64_t end) {
    Arena arena(static_cast<char*>(context.workspace) + layout.partial_bytes(a) + thread * layout.per_thread);
    Scratch<T> scratch(a, layout.blocks, arena);
    scratch.ring.fill_zeros();
    for (int64_t s = 0; s < a.S; ++s) scratch.columns[s] = layout.blocks.offset(a, s);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t g = divide(task, pieces), piece = task - g * pieces;
      const int64_t first = pieces == 1 ? 0 : layout.pieces.begin(piece);
      const int64_t size = pieces == 1 ? layout.pieces.count : layout.pieces.size(piece);
      sum_piece(a, args, layout, scratch, multiply, g, first, first + size);
      for (int64_t f = 0; f < filters; ++f) {
        T* to = partials + (piece * a.K + g * filters + f) * layout.sums;
        for (int64_t i = 0; i < layout.sums; ++i)
          to[i] = reduce_add(load(scratch.piece_sums + (f * layout.sums + i) * kLanes<T>));
        if (pieces == 1) write_gradient(a, args, g, f, g * filters + f, to);
      }
    }
  });
  if (pieces == 1) return;
  for (int64_t k = 0; k < a.K; ++k) {
    T* sums = partials + k * layout.sums;
    for (int64_t piece = 1; piece < pieces; ++piece) {
      for (int64_t i = 0; i < layout.sums; ++i) sums[i] += partials[(piece * a.K + k) * layout.sums + i];
    }
    write_gradient(a, args, k / filters, k % filters, k, sums);
  }
}

template <class T>
int64_t depthwise_wgrad_rows_workspace(const Conv2dProblem& a, const Machine& machine) {
  const Layout<T> layout(a);
  return layout.partial_bytes(a) + machine.threads * layout.per_thread;
}

template void depthwise_wgrad_rows_run<float>(const Conv2dProblem&, const Conv2dArgs&, const Context&);
template void depthwise_wgrad_rows_run<double>(const Conv2dProblem&, const Conv2dArgs&, const Context&);
template int64_t depthwise_wgrad_rows_workspace<float>(const Conv2dProblem&, const Machine&);
template int64_t depthwise_wgrad_rows_workspace<double>(const Conv2dProblem&, const Machine&);

}  // namespace fastconv::FASTCONV_TARGET

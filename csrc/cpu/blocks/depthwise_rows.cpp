// Depthwise forward with vectors along the output row (NCHW, and whatever else is not NHWC).
#include "cpu/blocks/activation.h"
#include "cpu/blocks/depthwise.h"
#include "cpu/blocks/depthwise_lines.h"
#include "cpu/blocks/parallel.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- tile: kRows output rows x one vector of columns of one channel.
//
// Taps that are not a multiple of the vector apart make unaligned loads, and a 64-byte load that crosses a line takes two cycles.
// So every load should serve several FMAs: with stride 1 the x of one input row and one s meets kRows output rows, and 7 rows of
// a 3x3 filter need 27 loads for 63 FMAs. 7 sums + 9 weights + 1 input are 17 of AVX-512's 32 registers; the others have 16, and
// take 4 rows: 14. Seven divides 7, 14, 28, 56 and 112.
constexpr int kRows = kVectorRegisters == 32 ? 7 : 4;

template <class T>
struct RowTile {
  const T* const* lines;   // [input row from the first that the tile needs]
  const int64_t* columns;  // [s]: where its input starts in a line
  const T* w;              // [r][s]
  int64_t R, S, stride, dilation;
  int64_t q_count;
  int rows;  // that exist
  T* y;
  const T* residual;  // or nullptr
  int64_t y_row, y_column;
  T bias;
  Activation activation;
};

// --- transform: nothing but the copied lines.

// These are kept out of the tile, whose code they would outgrow.
template <class T>
__attribute__((noinline)) void activate_all(Activation activation, vec<T>* values, int count) {
  for (int i = 0; i < count; ++i) values[i] = activate(activation, values[i]);
}

template <class T>
__attribute__((noinline)) void gather(const T* p, int64_t step, int lanes, vec<T>& to) {
  to = load_strided(p, step, lanes);
}
template <class T>
__attribute__((noinline)) void scatter(T* p, int64_t step, const vec<T>& from, int lanes) {
  store_strided(p, step, from, lanes);
}

template <class T>
FC_INLINE void store_tile(const RowTile<T>& a, vec<T> (&sum)[kRows], int64_t q) {
  constexpr int kL = kLanes<T>;
  const int lanes = a.q_count - q < kL ? int(a.q_count - q) : kL;
  const vec<T> bias = set1(a.bias);
#pragma GCC unroll 8
  for (int b = 0; b < kRows; ++b) sum[b] = sum[b] + bias;
  if (a.residual) {
#pragma GCC unroll 8
    for (int b = 0; b < kRows; ++b) {
      if (b >= a.rows) break;
      const T* residual = a.residual + b * a.y_row + q * a.y_column;
      vec<T> value;
      if (a.y_column == 1) {
        value = load(residual, lanes);
      } else {
        gather(residual, a.y_column, lanes, value);
      }
      sum[b] = sum[b] + value;
    }
  }
  if (a.activation == Activation::relu) {
#pragma GCC unroll 8
    for (int b = 0; b < kRows; ++b) sum[b] = activate(Activation::relu, sum[b]);
  } else if (a.activation == Activation::relu6) {
#pragma GCC unroll 8
    for (int b = 0; b < kRows; ++b) sum[b] = activate(Activation::relu6, sum[b]);
  } else if (a.activation != Activation::none) {
    vec<T> copy[kRows];
#pragma GCC unroll 8
    for (int b = 0; b < kRows; ++b) copy[b] = sum[b];
    activate_all(a.activation, copy, kRows);
#pragma GCC unroll 8
    for (int b = 0; b < kRows; ++b) sum[b] = copy[b];
  }
#pragma GCC unroll 8
  for (int b = 0; b < kRows; ++b) {
    if (b >= a.rows) break;
    T* y = a.y + b * a.y_row + q * a.y_column;
    if (a.y_column != 1) {
      const vec<T> value = sum[b];
      scatter(y, a.y_column, value, lanes);
    } else if (lanes == kL) {
      store(y, sum[b]);
    } else {
      store(y, sum[b], lanes);
    }
  }
}

// --- multiply. kR and kS are 0 where they are only known at run time; otherwise the vertical dilation is 1 and the stride
// kStride.
template <class T, int kR, int kS, int kStride>
void multiply_tile(const RowTile<T>& a) {
  constexpr int kL = kLanes<T>;
  for (int64_t q = 0; q < a.q_count; q += kL) {
    vec<T> sum[kRows];
#pragma GCC unroll 8
    for (int b = 0; b < kRows; ++b) sum[b] = zero<T>();
    if constexpr (kR > 0) {
#pragma GCC unroll 32
      for (int i = 0; i < (kRows - 1) * kStride + kR; ++i) {
        const T* line = a.lines[i] + q;
#pragma GCC unroll 8
        for (int s = 0; s < kS; ++s) {
          const vec<T> x = load(line + a.columns[s]);
#pragma GCC unroll 8
          for (int b = 0; b < kRows; ++b) {
            const int r = i - b * kStride;
            if (r >= 0 && r < kR) sum[b] = fma(x, set1(a.w[r * kS + s]), sum[b]);
          }
        }
      }
    } else {
      for (int64_t r = 0; r < a.R; ++r) {
        for (int64_t s = 0; s < a.S; ++s) {
          const vec<T> weight = set1(a.w[r * a.S + s]);
          const int64_t column = q + a.columns[s];
#pragma GCC unroll 8
          for (int b = 0; b < kRows; ++b) sum[b] = fma(load(a.lines[b * a.stride + r * a.dilation] + column), weight, sum[b]);
        }
      }
    }
    store_tile(a, sum, q);
  }
}

template <class T>
using TileFunction = void (*)(const RowTile<T>&);

template <class T>
TileFunction<T> choose_tile(const Conv2dProblem& a) {
  if (a.dilation_h == 1 && a.R == 3 && a.S == 3 && a.stride_h == 1) return multiply_tile<T, 3, 3, 1>;
  if (a.dilation_h == 1 && a.R == 3 && a.S == 3 && a.stride_h == 2) return multiply_tile<T, 3, 3, 2>;
  if (a.dilation_h == 1 && a.R == 5 && a.S == 5 && a.stride_h == 1) return multiply_tile<T, 5, 5, 1>;
  if (a.dilation_h == 1 && a.R == 7 && a.S == 7 && a.stride_h == 1) return multiply_tile<T, 7, 7, 1>;
  return multiply_tile<T, 0, 0, 0>;
}

// What one thread works in.
template <class T>
struct Scratch {
  T* weights;        // [R][S] of one filter
  int64_t* columns;  // [S]
  LineRing<T> ring;

  FC_INLINE Scratch(const Conv2dProblem& a, const RowBlocks<T>& blocks, Arena& arena)
      : weights(arena.take<T>(a.R * a.S)), columns(arena.take<int64_t>(a.S)), ring(blocks.window, blocks.line_size(a), arena) {}
};

template <class T>
int64_t scratch_bytes(const Conv2dProblem& a) {
  Arena arena(nullptr);
  Scratch<T>(a, RowBlocks<T>(a, kRows), arena);
  return arena.used();
}

}  // namespace

// --- run: one task is kRows output rows of one sample, group and block of columns; the filters of a group share its lines.
template <class T>
void depthwise_rows_run(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context) {
  const RowBlocks<T> blocks(a, kRows);
  const TileFunction<T> multiply = choose_tile<T>(a);
  const int64_t per_thread = scratch_bytes<T>(a), filters = a.K / a.groups, tiles = (a.P + kRows - 1) / kRows;
  parallel_ranges(context, a.N * a.groups * blocks.q_blocks * tiles, [&](int thread, int64_t begin, int64_t end) {
    Arena arena(static_cast<char*>(context.workspace) + thread * per_thread);
    Scratch<T> scratch(a, blocks, arena);
    scratch.ring.fill_zeros();
    for (int64_t s = 0; s < a.S; ++s) scratch.columns[s] = blocks.offset(a, s);
    int64_t unit = begin / tiles;
    int64_t p0 = begin % tiles * kRows, q_block = unit % blocks.q_blocks;
    int64_t g = unit / blocks.q_blocks % a.groups, n = unit / blocks.q_blocks / a.groups;
    for (int64_t task = begin; task < end; ++task, p0 += kRows) {
      if (p0 >= a.P) {
        p0 = 0;
        scratch.ring.clear();
        if (++q_block == blocks.q_blocks) {
          q_block = 0;
          if (++g == a.groups) g = 0, ++n;
        }
      }
      const int64_t q0 = q_block * blocks.q_size;
      const int64_t w0 = q0 * a.stride_w - a.pad_left;
      RowTile<T> tile;
      tile.rows = a.P - p0 < kRows ? int(a.P - p0) : kRows;
      scratch.ring.fetch_tile(a, p0, tile.rows, [&](const int64_t* h, T* const* to, int64_t count) {
        copy_rows(a, static_cast<const T*>(args.x) + n * a.x.n + g * a.x.c, h, to, count, w0, blocks.columns);
      });
      tile.lines = scratch.ring.lines, tile.columns = scratch.columns, tile.w = scratch.weights;
      tile.R = a.R, tile.S = a.S, tile.stride = a.stride_h, tile.dilation = a.dilation_h;
      tile.q_count = a.Q - q0 < blocks.q_size ? a.Q - q0 : blocks.q_size;
      tile.y_row = a.y.h, tile.y_column = a.y.w;
      tile.activation = a.epilogue.activation;
      for (int64_t k = g * filters; k < (g + 1) * filters; ++k) {
        const T* w = static_cast<const T*>(args.w) + g * a.w.g + (k - g * filters) * a.w.k;
        if (p0 == 0 || task == begin || filters > 1) {
          for (int64_t r = 0; r < a.R; ++r) {
            for (int64_t s = 0; s < a.S; ++s) scratch.weights[r * a.S + s] = w[r * a.w.r + s * a.w.s];
          }
        }
        const int64_t y_offset = n * a.y.n + k * a.y.c + p0 * a.y.h + q0 * a.y.w;
        tile.y = static_cast<T*>(args.y) + y_offset;
        tile.residual = a.epilogue.residual ? static_cast<const T*>(args.residual) + y_offset : nullptr;
        tile.bias = a.epilogue.bias ? static_cast<const T*>(args.bias)[k] : T(0);
        multiply(tile);
      }
    }
  });
}

template <class T>
int64_t depthwise_rows_workspace(const Conv2dProblem& a, const Machine& machine) {
  return machine.threads * scratch_bytes<T>(a);
}

template void depthwise_rows_run<float>(const Conv2dProblem&, const Conv2dArgs&, const Context&);
template void depthwise_rows_run<double>(const Conv2dProblem&, const Conv2dArgs&, const Context&);
template int64_t depthwise_rows_workspace<float>(const Conv2dProblem&, const Machine&);
template int64_t depthwise_rows_workspace<double>(const Conv2dProblem&, const Machine&);

}  // namespace fastconv::FASTCONV_TARGET

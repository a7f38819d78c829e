#include "cpu/blocks/gemm_tile.h"

#include "cpu/blocks/activation.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// Depths from a load of the panel to its prefetch. The panel streams from L2 at a line for every six FMAs; with four depths of
// notice a tile of 6x64 runs at 149 instead of 139 GFLOP/s on 384 KB of panel (peak 154), and loses nothing where it is in L1.
constexpr int64_t kPanelAhead = 4;
// The same for the broadcast operand, where all rows of a tile are neighbours and every depth is on a line of its own, as in
// filter gradients: 107 to 129 GFLOP/s. Elsewhere it is one wasted instruction of 41.
constexpr int64_t kRowsAhead = 8;

// The epilogue of one vector of columns. `offset` is from y[m] to the first of them.
template <class T>
FC_INLINE vec<T> finish(const TileOutput<T>& out, int m, vec<T> sum, const T* column_bias, int64_t offset, int64_t step, int n) {
  if (column_bias) sum = sum + load(column_bias, n);
  if (out.row_bias) sum = sum + set1(out.row_bias[m]);
  if (out.residual) {
    const T* residual = out.residual + (out.y[m] - out.y_base) + offset;
    sum = sum + (step == 1 ? load(residual, n) : load_strided(residual, step, n));
  }
  return activate(out.activation, sum);
}

}  // namespace

template <class T>
void store_sums(const T* sums, int width, int rows, const TileOutput<T>& out) {
  for (int m = 0; m < rows; ++m) {
    for (int i = 0; i < out.piece_count; ++i) {
      const ColumnPiece& piece = out.pieces[i];
      for (int column = piece.begin; column < piece.end; column += kLanes<T>) {
        const int n = piece.end - column < kLanes<T> ? piece.end - column : kLanes<T>;
        const int64_t offset = piece.offset + (column - piece.begin) * piece.step;
        T* y = out.y[m] + offset;
        vec<T> sum = load(sums + m * width + column, n);
        if (out.accumulate) sum = sum + (piece.step == 1 ? load(y, n) : load_strided(y, piece.step, n));
        if (out.finish) sum = finish(out, m, sum, out.column_bias ? out.column_bias + column : nullptr, offset, piece.step, n);
        if (piece.step == 1) {
          store(y, sum, n);
        } else {
          store_strided(y, piece.step, sum, n);
        }
      }
    }
  }
}

namespace {

// Activations with an exponential, of `count` vectors in memory.
template <class T>
__attribute__((noinline)) void activate_all(Activation activation, int count, T* values) {
  for (int i = 0; i < count; ++i) store(values + i * kLanes<T>, activate(activation, load(values + i * kLanes<T>)));
}

// The end of a tile that is one piece: `last` lanes of its last vector, all of them where it is `kWhole`, are columns of y.
//
// In registers, because that is as much work as it looks: by way of memory, with a switch for every vector, it took as long as 20
// steps of the multiplication, and a 1x1 layer has 16 to 64 of them.
template <class T, int kRows, int kVectors, bool kWhole>
FC_INLINE void finish_tile(vec<T> (&sum)[kRows][kVectors], int last, const TileOutput<T>& out) {
  constexpr int kL = kLanes<T>;
  const auto read = [&](const T* from, int v) __attribute__((always_inline)) {
    return kWhole || v + 1 < kVectors ? load(from + v * kL) : load(from + v * kL, last);
  };
  const auto for_each = [&](const auto& change) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[m][v] = change(sum[m][v], m, v);
    }
  };
  const int64_t offset = out.pieces[0].offset;
  if (out.accumulate) {
    for_each([&](vec<T> x, int m, int v) __attribute__((always_inline)) { return x + read(out.y[m] + offset, v); });
  }
  if (out.finish) {
    if (out.column_bias) {
      vec<T> bias[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) bias[v] = read(out.column_bias, v);
      for_each([&](vec<T> x, int, int v) __attribute__((always_inline)) { return x + bias[v]; });
    }
    if (out.row_bias) {
      for_each([&](vec<T> x, int m, int) __attribute__((always_inline)) { return x + set1(out.row_bias[m]); });
    }
    if (out.residual) {
      for_each([&](vec<T> x, int m, int v)
                   __attribute__((always_inline)) { return x + read(out.residual + (out.y[m] - out.y_base) + offset, v); });
    }
    if (out.activation == Activation::relu) {
      for_each([&](vec<T> x, int, int) __attribute__((always_inline)) { return activate(Activation::relu, x); });
    } else if (out.activation == Activation::relu6) {
      for_each([&](vec<T> x, int, int) __attribute__((always_inline)) { return activate(Activation::relu6, x); });
    } else if (out.activation != Activation::none) {
      // One body for the whole tile: unrolled, the exp of every vector would be 20 KB of code in each of 40 tiles.
      T whole[kRows * kVectors * kL];
      for_each([&](vec<T> x, int m, int v) __attribute__((always_inline)) {
        store(whole + (m * kVectors + v) * kL, x);
        return x;
      });
      activate_all(out.activation, kRows * kVectors, whole);
      for_each([&](vec<T>, int m, int v) __attribute__((always_inline)) { return load(whole + (m * kVectors + v) * kL); });
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
    T* y = out.y[m] + offset;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      if (kWhole || v + 1 < kVectors) {
        store(y + v * kL, sum[m][v]);
      } else {
        store(y + v * kL, sum[m][v], last);
      }
    }
  }
}

template <class T, int kRows, int kVectors>
void tile(const TileInput<T>& in, const TileOutput<T>& out) {
  constexpr int kL = kLanes<T>;
  // Narrow tiles load for every FMA or two and have no slot left for prefetches: 96 -> 101 GFLOP/s on 144 -> 32 channels of 1x1.
  constexpr bool kWide = kVectors > 2;
  vec<T> sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[m][v] = zero<T>();
  }
  // What the end of the tile reads and writes comes from L2 or further: 103 to 120 GFLOP/s in a filter gradient of 400 pixels at
  // a time; ResNet-50, whose 64 -> 256 channels of 56x56 write 3 MB and add as much, is 1.05 times as fast.
  if (kWide || out.accumulate) {
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      const T* const y = out.y[m] + out.pieces[0].offset;
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) __builtin_prefetch(y + v * kL, 1);
      if (out.residual && out.finish) {
        const T* const residual = out.residual + (y - out.y_base);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) __builtin_prefetch(residual + v * kL);
      }
    }
  }
  const T* b = in.b;
  const T* const* rows = in.a;
  const int64_t end = in.depth * in.a_step;
  const char* next = in.next ? in.next : reinterpret_cast<const char*>(b);
  for (int64_t t = 0; t < in.taps; ++t, rows += in.tap_offsets ? 0 : kRows) {
    const int64_t offset = in.tap_offsets ? in.tap_offsets[t] : 0;
    const T* a[kRows];
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) a[m] = rows[m] + offset;
    for (int64_t d = 0; d != end; d += in.a_step, b += in.width) {
      vec<T> panel[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        panel[v] = load(b + v * kL);
        if (kWide) __builtin_prefetch(b + v * kL + kPanelAhead * in.width);
      }
      if (kWide) {
        __builtin_prefetch(a[0] + d + kRowsAhead * in.a_step);
        __builtin_prefetch(next, 0, 2);
        next += 64;
      }
#pragma GCC unroll 16
      for (int m = 0; m < kRows; ++m) {
        const vec<T> row = set1(a[m][d]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[m][v] = fma(row, panel[v], sum[m][v]);
      }
    }
  }

  // Tiles of several pieces, or of columns with gaps: the sums go through memory, and from there piece by piece.
  const ColumnPiece& piece = out.pieces[0];
  const int last = piece.end - (kVectors - 1) * kL;  // columns of the last vector
  if (out.piece_count != 1 || piece.step != 1 || last < 1 || last > kL) {
    T edge[kRows * kVectors * kL];
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) store(edge + (m * kVectors + v) * kL, sum[m][v]);
    }
    return store_sums(edge, kVectors * kL, kRows, out);
  }
  if (last == kL) {
    finish_tile<T, kRows, kVectors, true>(sum, kL, out);
  } else {
    finish_tile<T, kRows, kVectors, false>(sum, last, out);
  }
}

template <class T>
using TileFunction = void (*)(const TileInput<T>&, const TileOutput<T>&);

template <class T>
struct TileTable {
  TileFunction<T> at[GemmTile::kMaxVectors][GemmTile::kMaxRows] = {};
};

template <class T, int kVectors, int kRows>
constexpr void fill(TileTable<T>& table) {
  if constexpr (kVectors > 0) {
    if constexpr (kRows > GemmTile::rows(kVectors)) {
      fill<T, kVectors - 1, 1>(table);
    } else {
      table.at[kVectors - 1][kRows - 1] = tile<T, kRows, kVectors>;
      fill<T, kVectors, kRows + 1>(table);
    }
  }
}

template <class T>
constexpr TileTable<T> make_table() {
  TileTable<T> table;
  fill<T, GemmTile::kMaxVectors, 1>(table);
  return table;
}

template <class T>
constexpr TileTable<T> kTiles = make_table<T>();

}  // namespace

template <class T>
void gemm_tile(int rows, int vectors, const TileInput<T>& in, const TileOutput<T>& out) {
  kTiles<T>.at[vectors - 1][rows - 1](in, out);
}

template void store_sums(const float*, int, int, const TileOutput<float>&);
template void store_sums(const double*, int, int, const TileOutput<double>&);
template void gemm_tile(int, int, const TileInput<float>&, const TileOutput<float>&);
template void gemm_tile(int, int, const TileInput<double>&, const TileOutput<double>&);

}  // namespace fastconv::FASTCONV_TARGET

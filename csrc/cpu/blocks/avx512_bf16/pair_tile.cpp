#include "cpu/blocks/avx512_bf16/pair_tile.h"

#include "cpu/blocks/activation.h"
#include "cpu/blocks/avx512_bf16/pair_columns.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

constexpr int kL = kLanes<float>;

// Activations with an exponential, of `count` vectors in memory.
__attribute__((noinline)) void activate_all(Activation activation, int count, float* values) {
  for (int i = 0; i < count; ++i) store(values + i * kL, activate(activation, load(values + i * kL)));
}

// gemm_tile's epilogue and the rounding, in registers: `last` lanes of the last vector are columns of y.
template <int kRows, int kVectors, bool kWhole>
FC_INLINE void finish(vec<float> (&sum)[kRows][kVectors], int last, const PairOutput& out) {
  const auto read = [&](const bf16* from, int v) __attribute__((always_inline)) {
    return kWhole || v + 1 < kVectors ? load(from + v * kL) : load(from + v * kL, last);
  };
  const auto for_each = [&](const auto& change) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[m][v] = change(sum[m][v], m, v);
    }
  };
  if (out.bias) {
    vec<float> bias[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) bias[v] = read(out.bias, v);
    for_each([&](vec<float> x, int, int v) __attribute__((always_inline)) { return x + bias[v]; });
  }
  if (out.residual) {
    for_each([&](vec<float> x, int m, int v)
                 __attribute__((always_inline)) { return x + read(out.residual + (out.y[m] - out.y_base), v); });
  }
  if (out.activation == Activation::relu) {
    for_each([&](vec<float> x, int, int) __attribute__((always_inline)) { return activate(Activation::relu, x); });
  } else if (out.activation != Activation::none) {
    // One body for the whole tile: unrolled, the exp of every vector would be 20 KB of code in each of 34 tiles.
    float whole[kRows * kVectors * kL];
    for_each([&](vec<float> x, int m, int v) __attribute__((always_inline)) {
      store(whole + (m * kVectors + v) * kL, x);
      return x;
    });
    activate_all(out.activation, kRows * kVectors, whole);
    for_each([&](vec<float>, int m, int v) __attribute__((always_inline)) { return load(whole + (m * kVectors + v) * kL); });
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
    bf16* const y = out.y[m];
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

template <int kRows, int kVectors>
FC_INLINE void begin_sums(vec<float> (&sum)[kRows][kVectors], const float* before) {
  constexpr int64_t kWidth = kVectors * kL;
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[m][v] = before ? load(before + m * kWidth + v * kL) : zero<float>();
  }
}

template <int kRows, int kVectors>
FC_INLINE void end_sums(vec<float> (&sum)[kRows][kVectors], const PairOutput& out) {
  constexpr int64_t kWidth = kVectors * kL;
  if (out.sums) {
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) store(out.sums + m * kWidth + v * kL, sum[m][v]);
    }
    return;
  }
  const int last = out.columns - (kVectors - 1) * kL;
  if (last == kL) {
    finish<kRows, kVectors, true>(sum, kL, out);
  } else {
    finish<kRows, kVectors, false>(sum, last, out);
  }
}

template <int kRows, int kVectors>
void tile(const PairInput& in, const PairOutput& out) {
  vec<float> sum[kRows][kVectors];
  begin_sums(sum, out.before);
  const bf16* rows[kRows];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) rows[m] = in.a[m];
  const bf16* b = in.b;
  const int64_t step = 2 * in.width, ahead = in.ahead * step, end = in.a_step * in.pairs;
  for (int64_t d = 0; d != end; d += in.a_step, b += step) {
    vec<float> panel[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      panel[v] = load(reinterpret_cast<const float*>(b + 2 * v * kL));
      __builtin_prefetch(b + ahead + 2 * v * kL);
    }
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      const vec<float> row = set1_pair(rows[m] + d);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[m][v] = add_pairs(sum[m][v], row, panel[v]);
    }
  }
  end_sums(sum, out);
}

using TileFunction = void (*)(const PairInput&, const PairOutput&);

struct TileTable {
  TileFunction at[GemmTile::kMaxVectors][GemmTile::kMaxRows] = {};
};

template <int kVectors, int kRows>
constexpr void fill(TileTable& table) {
  if constexpr (kVectors > 0) {
    if constexpr (kRows > GemmTile::rows(kVectors)) {
      fill<kVectors - 1, 1>(table);
    } else {
      table.at[kVectors - 1][kRows - 1] = tile<kRows, kVectors>;
      fill<kVectors, kRows + 1>(table);
    }
  }
}

constexpr TileTable make_table() {
  TileTable table;
  fill<GemmTile::kMaxVectors, 1>(table);
  return table;
}

constexpr TileTable kTiles = make_table();

template <int kRows>
void thin(const ThinPairs& in, const PairOutput& out) {
  vec<float> sum[kRows][1];
  begin_sums(sum, nullptr);
  const auto add = [&](int64_t i, vec<float> column) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) sum[m][0] = add_pairs(sum[m][0], set1_pair(in.a[m] + 2 * i), column);
  };
  const ReadAhead ahead = ReadAhead::of_matrix(in.depth, in.depth, kLanes<float>, in.k_step);
  for_each_pair_column(in.w, in.k_step, out.columns, in.depth, add, ahead);
  end_sums(sum, out);
}

template <int kRows>
void pick(int rows, const ThinPairs& in, const PairOutput& out) {
  if (rows == kRows) return thin<kRows>(in, out);
  if constexpr (kRows > 1) pick<kRows - 1>(rows, in, out);
}

}  // namespace

void pair_tile(int rows, int vectors, const PairInput& in, const PairOutput& out) { kTiles.at[vectors - 1][rows - 1](in, out); }

void thin_pairs(int rows, const ThinPairs& in, const PairOutput& out) { pick<kThinPairRows>(rows, in, out); }

}  // namespace fastconv::FASTCONV_TARGET

#include "cpu/blocks/avx512_bf16/pair_strip.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

constexpr int kL = kLanes<float>, kMaxVectors = GemmTile::kMaxVectors, kMaxRows = GemmTile::rows(kMaxVectors);
// Rows of b from a load to its prefetch, as in attention_tile.cpp.
constexpr int64_t kAhead = 4;
// The same of a, where pairs lie apart and each is on a line of its own, as in gemm_tile.cpp.
constexpr int64_t kRowsAhead = 8;

template <int kRows, int kVectors, bool kApart = false>
struct Sums {
  vec<float> at[kRows][kVectors];

  FC_INLINE Sums(const bf16* const (&rows)[kRows], const bf16* b, int64_t width, int64_t pairs, int64_t a_step = 2) {
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) at[m][v] = zero<float>();
    }
    const int64_t step = 2 * width;
    for (int64_t d = 0, end = a_step * pairs; d < end; d += a_step, b += step) {
      if (kApart) __builtin_prefetch(rows[0] + d + kRowsAhead * a_step);
      vec<float> panel[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        panel[v] = load(reinterpret_cast<const float*>(b + 2 * v * kL));
        __builtin_prefetch(b + kAhead * step + 2 * v * kL);
      }
#pragma GCC unroll 16
      for (int m = 0; m < kRows; ++m) {
        const vec<float> row = set1_pair(rows[m] + d);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) at[m][v] = add_pairs(at[m][v], row, panel[v]);
      }
    }
  }

  FC_INLINE void store_at(float* to, int64_t row) const {
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m, to += row) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) store(to + v * kL, at[m][v]);
    }
  }
};

template <int kRows>
FC_INLINE void point(const PairStrip& in, const bf16* (&rows)[kRows]) {
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) rows[m] = in.a + m * in.a_row;
}

template <int kRows, int kVectors>
void scores(const PairStrip in, int64_t panels, float* s, int64_t s_row, float* most) {
  const bf16* rows[kRows];
  point(in, rows);
  const bf16* b = in.b;
  for (int64_t panel = 0; panel < panels; ++panel, b += in.pairs * 2 * in.width, s += kVectors * kL) {
    const Sums<kRows, kVectors> sums(rows, b, in.width, in.pairs);
    sums.store_at(s, s_row);
    if (!most) continue;
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      vec<float> largest = load(most + m * kL);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) largest = max(sums.at[m][v], largest);
      store(most + m * kL, largest);
    }
  }
}

template <int kRows, int kVectors, bool kApart>
void values(const PairStrip in, float* out, int64_t out_row, const float* shrink) {
  const bf16* rows[kRows];
  point(in, rows);
  // What is there comes from the L2, and is needed when the sums are done.
  if (shrink) {
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) __builtin_prefetch(out + m * out_row + v * kL, 1);
    }
  }
  Sums<kRows, kVectors, kApart> sums(rows, in.b, in.width, in.pairs, kApart ? in.a_step : 2);
  if (shrink) {
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      const vec<float> factor = set1(shrink[m]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums.at[m][v] = fma(load(out + m * out_row + v * kL), factor, sums.at[m][v]);
    }
  }
  sums.store_at(out, out_row);
}

using ScoreFunction = void (*)(PairStrip, int64_t, float*, int64_t, float*);
using ValueFunction = void (*)(PairStrip, float*, int64_t, const float*);

struct Tables {
  ScoreFunction scores[kMaxRows][kMaxVectors];
  ValueFunction values[kMaxRows][kMaxVectors], apart[kMaxRows][kMaxVectors];
};

template <int kRows, int kVectors>
constexpr void fill(Tables& tables) {
  tables.scores[kRows - 1][kVectors - 1] = scores<kRows, kVectors>;
  tables.values[kRows - 1][kVectors - 1] = values<kRows, kVectors, false>;
  tables.apart[kRows - 1][kVectors - 1] = values<kRows, kVectors, true>;
  if constexpr (kVectors > 1) {
    fill<kRows, kVectors - 1>(tables);
  } else if constexpr (kRows > 1) {
    fill<kRows - 1, kMaxVectors>(tables);
  }
}

constexpr Tables make_tables() {
  Tables tables{};
  fill<kMaxRows, kMaxVectors>(tables);
  return tables;
}

constexpr Tables kTables = make_tables();

}  // namespace

void score_pairs(int rows, int vectors, const PairStrip& in, int64_t panels, float* s, int64_t s_row, float* most) {
  kTables.scores[rows - 1][vectors - 1](in, panels, s, s_row, most);
}

void value_pairs(int rows, int vectors, const PairStrip& in, float* out, int64_t out_row, const float* shrink) {
  (in.a_step == 2 ? kTables.values : kTables.apart)[rows - 1][vectors - 1](in, out, out_row, shrink);
}

}  // namespace fastconv::FASTCONV_TARGET

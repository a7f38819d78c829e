// Weights times values in pairs of keys, the keys of a pair that a query does not see, and what the backward pass multiplies.
#pragma once

#include "cpu/blocks/attention.h"
#include "cpu/blocks/avx512_bf16/pair_columns.h"
#include "cpu/blocks/avx512_bf16/pair_strip.h"

namespace fastconv::FASTCONV_TARGET {

// For as long as it lives, one key of a pair of values counts as zeros.
class Hidden {
 public:
  FC_INLINE Hidden(bf16* value, int64_t width, bf16* kept) : value_(value), width_(value ? width : 0), kept_(kept) {
    for (int64_t c = 0; c < width_; ++c) kept_[c] = value_[2 * c], value_[2 * c] = bf16{0};
  }
  FC_INLINE ~Hidden() {
    for (int64_t c = 0; c < width_; ++c) value_[2 * c] = kept_[c];
  }
  Hidden(const Hidden&) = delete;
  Hidden& operator=(const Hidden&) = delete;

 private:
  bf16* value_;
  int64_t width_;
  bf16* kept_;
};

FC_INLINE void multiply_pairs(int64_t rows, int64_t width, PairStrip in, float* out, const float* shrink) {
  const Parts columns(width / kLanes<float>, GemmTile::kMaxVectors);
  const bf16* const b = in.b;
  for (int64_t part = 0; part < columns.parts; ++part) {
    const int64_t column = columns.begin(part) * kLanes<float>;
    in.b = b + 2 * column;
    value_pairs(int(rows), int(columns.size(part)), in, out + column, width, shrink);
  }
}

// Rows of bf16, two side by side.
FC_INLINE void pair_up(const bf16* rows, int64_t count, int64_t width, bf16* two) {
  for (int64_t m = 0; m < count; m += 2, rows += 2 * width, two += 2 * width) {
    interleave(rows, m + 1 < count ? rows + width : nullptr, width, width, two);
  }
}

// p and ds of a chunk of queries, [row][line], and where they go as bf16: of two queries side by side, and ds by keys.
struct Gradients {
  int64_t rows;
  KeyRange vectors;
  int64_t line;
  const float *p, *ds;
  bf16 *p_two, *ds_two, *ds_rows;
};

inline void round_weights(const Gradients& at) {
  constexpr int64_t kL = kLanes<float>;
  for (int64_t m = 0; m < at.rows; m += 2) {
    const bool second = m + 1 < at.rows;
    for (int64_t j = at.vectors.begin; j < at.vectors.end; j += kL) {
      const auto two = [&](const float* x) {
        x += m * at.line + j;
        return narrow_pairs(load(x), second ? load(x + at.line) : zero<float>());
      };
      const vec<float> p = two(at.p), ds = two(at.ds);
      store(reinterpret_cast<float*>(at.p_two + m * at.line + 2 * j), side_by_side(p));
      store(reinterpret_cast<float*>(at.ds_two + m * at.line + 2 * j), side_by_side(ds));
      const __m512i halves = _mm512_castps_si512(ds.v);
      store_halves(at.ds_rows + m * at.line + j, _mm512_castsi512_si256(halves));
      if (second) store_halves(at.ds_rows + (m + 1) * at.line + j, _mm512_extracti64x4_epi64(halves, 1));
    }
  }
}

// The products added to what is there, for any number of rows.
FC_INLINE void add_products(int64_t rows, int64_t width, PairStrip in, float* out) {
  constexpr int kMost = GemmTile::rows(GemmTile::kMaxVectors);
  const float ones[kMost] = {1, 1, 1, 1, 1, 1};
  const Parts tiles(rows, kMost);
  const bf16* const a = in.a;
  for (int64_t t = 0; t < tiles.parts; ++t) {
    in.a = a + tiles.begin(t) * in.a_row;
    multiply_pairs(tiles.size(t), width, in, out + tiles.begin(t) * width, ones);
  }
}

}  // namespace fastconv::FASTCONV_TARGET

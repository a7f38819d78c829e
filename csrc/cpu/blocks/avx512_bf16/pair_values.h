// Weights times values in pairs of keys, and the keys of a pair that a query does not see.
#pragma once

#include "cpu/blocks/attention.h"
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

}  // namespace fastconv::FASTCONV_TARGET

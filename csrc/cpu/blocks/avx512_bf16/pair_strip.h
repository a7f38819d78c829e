// The two products of attention for a tile of queries, in pairs of bf16: attention_tile.h's, of features for scores and of keys
// for values. What comes right behind each is done while its sums are in registers.
#pragma once

#include "cpu/blocks/gemm_tile.h"
#include "cpu/simd/half.h"

namespace fastconv::FASTCONV_TARGET {

// sum[m][v] = sum over i < pairs of  a[m*a_row + i*a_step] * b[2*(i*width + v*lanes) ...] and the same of the upper ones. For 1
// to GemmTile::rows(4) rows, each a chain over the pairs from 0 on.
struct PairStrip {
  const bf16* a;
  int64_t a_row;
  const bf16* b;
  int64_t width;  // columns of b
  int64_t pairs;
  int64_t a_step = 2;  // of scores always
};

// s[m*s_row + panel*vectors*lanes ...] = sums, where panel i of b starts i*pairs*2*width elements after b; and lane by lane
// most[m*lanes ...] = the larger of that and of those sums, where `most` is given.
void score_pairs(int rows, int vectors, const PairStrip& in, int64_t panels, float* s, int64_t s_row, float* most);

// out[m*out_row ...] = sums, plus shrink[m] times what is there where `shrink` is given.
void value_pairs(int rows, int vectors, const PairStrip& in, float* out, int64_t out_row, const float* shrink);

}  // namespace fastconv::FASTCONV_TARGET

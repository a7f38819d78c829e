// The two products of attention for a full tile of queries, and what comes right behind each while its sums are in registers: the
// scores' largest, and the shrinking of what was summed so far.
//
// A general tile (gemm_tile.h) finds its operands through pointers and pieces, which costs 100 cycles where a tile has only 64
// features, 770 cycles of products. Here both operands lie at fixed steps, and one call covers a row of panels.
//
// Sums are chains of FMAs in the order of depth from 0 on, as in gemm_tile: the same bits.
#pragma once

#include "cpu/blocks/gemm_tile.h"

namespace fastconv::FASTCONV_TARGET {

// sum[m][v] = sum over d < depth of a[m*a_row + d] * b[d*b_step + v*lanes ...]
template <class T>
struct Strip {
  static constexpr int kVectors = GemmTile::kMaxVectors;
  static constexpr int kRows = GemmTile::rows(kVectors);  // always so many

  const T* a;
  int64_t a_row;
  const T* b;
  int64_t b_step, depth;
};

// s[m*s_row + panel*vectors*lanes ...] = sums, where panel i of b starts i*depth*b_step elements after b; and lane by lane
// most[m*lanes ...] = the larger of that and of those sums, where `most` is given.
template <class T>
void score_strip(int vectors, const Strip<T>& in, int64_t panels, T* s, int64_t s_row, T* most);

// out[m*out_row ...] = sums, plus shrink[m] times what is there where `shrink` is given.
template <class T>
void value_strip(int vectors, const Strip<T>& in, T* out, int64_t out_row, const T* shrink);

extern template void score_strip(int, const Strip<float>&, int64_t, float*, int64_t, float*);
extern template void score_strip(int, const Strip<double>&, int64_t, double*, int64_t, double*);
extern template void value_strip(int, const Strip<float>&, float*, int64_t, const float*);
extern template void value_strip(int, const Strip<double>&, double*, int64_t, const double*);

}  // namespace fastconv::FASTCONV_TARGET

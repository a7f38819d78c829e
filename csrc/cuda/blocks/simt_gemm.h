// A tile of a matrix product on the FMA units, in strict fp32: 64 x 64 sums of a block of 256 threads.
//
// Shared memory holds one slice of 16 of the reduction; each thread holds 4 x 4 sums and reads 8 numbers for 16 FMAs. The order
// of every sum is that of the reduction, whatever the tile.
#pragma once

#include "cuda/blocks/element.h"

namespace fastconv::sm80 {

struct SimtTile {
  static constexpr int kM = 64, kN = 64, kDepth = 16, kThreads = 256;
  static constexpr int kOwn = 4;                         // rows, and columns, of a thread
  static constexpr int kLoads = kM * kDepth / kThreads;  // elements of each operand that a thread brings
  static_assert(kM == kN && kThreads * kOwn * kOwn == kM * kN && kLoads * kThreads == kM * kDepth);
  // Products are summed in chains of this length, and the chains in order: rounding grows with 32 + L / 32 and not with L. That
  // costs 16 additions to 512 FMAs.
  static constexpr int kChain = 32;
  static_assert(kChain % kDepth == 0);
  // Rows of 16-byte packs; four numbers of padding, or the lanes that store along the depth would meet in two banks.
  static constexpr int kPitch = kM + 4;
};

struct SimtShared {
  alignas(16) float a[SimtTile::kDepth][SimtTile::kPitch], b[SimtTile::kDepth][SimtTile::kPitch];
};

// Which element of an operand's slice a thread brings in its i-th load: neighbouring threads go along the depth where that is how
// the operand lies in memory, else along the rows.
struct SimtShare {
  bool along_depth;
  FC_DEVICE int row(int i) const {
    const int t = int(threadIdx.x);
    return along_depth ? t / SimtTile::kDepth + i * (SimtTile::kThreads / SimtTile::kDepth) : t % SimtTile::kM;
  }
  FC_DEVICE int depth(int i) const {
    const int t = int(threadIdx.x);
    return along_depth ? t % SimtTile::kDepth : t / SimtTile::kM + i * (SimtTile::kThreads / SimtTile::kM);
  }
};

// sum[i][j] = sum over begin <= d < end of a(own_m + i, d) * b(own_n + j, d). An operand has `share`, and load(i, d) gives
// element (share.row(i), d) as float.
template <class A, class B>
FC_DEVICE void simt_multiply(SimtShared& shared, uint32_t begin, uint32_t end, const A& a, const B& b, int own_m, int own_n,
                             float (&sum)[SimtTile::kOwn][SimtTile::kOwn]) {
  constexpr int kOwn = SimtTile::kOwn;
  float chain[kOwn][kOwn] = {};
  const auto close_chain = [&] {
    FC_UNROLL
    for (int i = 0; i < kOwn; ++i) {
      FC_UNROLL
      for (int j = 0; j < kOwn; ++j) {
        sum[i][j] += chain[i][j];
        chain[i][j] = 0;
      }
    }
  };
  for (uint32_t slice = begin; slice < end; slice += SimtTile::kDepth) {
    FC_UNROLL
    for (int i = 0; i < SimtTile::kLoads; ++i) {
      const uint32_t da = slice + uint32_t(a.share.depth(i)), db = slice + uint32_t(b.share.depth(i));
      shared.a[a.share.depth(i)][a.share.row(i)] = da < end ? a.load(i, da) : 0.0f;
      shared.b[b.share.depth(i)][b.share.row(i)] = db < end ? b.load(i, db) : 0.0f;
    }
    __syncthreads();
    FC_UNROLL
    for (int d = 0; d < SimtTile::kDepth; ++d) {
      const Pack<float, kOwn> row = load_pack<kOwn>(&shared.a[d][own_m]), column = load_pack<kOwn>(&shared.b[d][own_n]);
      FC_UNROLL
      for (int i = 0; i < kOwn; ++i) {
        FC_UNROLL
        for (int j = 0; j < kOwn; ++j) chain[i][j] = fmaf(row.v[i], column.v[j], chain[i][j]);
      }
    }
    if ((slice - begin) % SimtTile::kChain == SimtTile::kChain - SimtTile::kDepth) close_chain();
    __syncthreads();  // the next slice overwrites this one
  }
  close_chain();
}

}  // namespace fastconv::sm80

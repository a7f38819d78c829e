// gemm_tile of pairs: bf16 operands whose products VDPBF16PS takes two at a time, summed in floats.
//
//   sum[m][k] = sum over pairs i of  a[m][i][0] * b[i][k][0] + a[m][i][1] * b[i][k][1]
//
// The broadcast operand `a` is read where it lies, 32 bits at a time; the vector operand is a packed panel. A sum is one chain
// over all pairs, whatever the tile and wherever the reduction is cut: what was summed so far is loaded into the registers.
#pragma once

#include "cpu/blocks/gemm_tile.h"
#include "cpu/simd/half.h"

namespace fastconv::FASTCONV_TARGET {

struct PairInput {
  const bf16* const* a;  // [rows], each [pairs], a_step numbers from one pair to the next
  const bf16* b;         // [pairs][width][2]
  int64_t width;         // columns: whole vectors
  int64_t pairs;
  int64_t ahead;  // rows of b from a load to its prefetch
  int64_t a_step = 2;
};

// Where a tile goes: to y, rounded once behind the epilogue, or to `sums` where there is more to add. `columns` count in y.
struct PairOutput {
  const float* before;  // [rows][width]: sums so far, or absent
  float* sums;          // [rows][width], or absent where this is the end
  bf16* const* y;       // [rows]
  int columns;
  Activation activation;
  const bf16* bias;      // [columns], or absent
  const bf16* residual;  // of the element at y_base, or absent; laid out as y is
  const bf16* y_base;
};

// Rows of b from a load to its prefetch: out of the L2, and out of memory where few rows use it once.
inline constexpr int64_t kAheadInL2 = 4, kAheadInMemory = 16;

// One tile of 1 <= rows <= GemmTile::rows(vectors).
void pair_tile(int rows, int vectors, const PairInput& in, const PairOutput& out);

// Rows up to which filters are not worth packing where their depth is contiguous, see thin_tile.h.
inline constexpr int kThinPairRows = 8;

// The same for filters as they lie, filter k at w[k*k_step]: at most a vector of them, `depth` numbers each.
struct ThinPairs {
  const bf16* const* a;  // [rows], each [depth rounded up to pairs]
  const bf16* w;
  int64_t k_step, depth;
};
void thin_pairs(int rows, const ThinPairs& in, const PairOutput& out);

// Panels of pairs [depth rounded up to pairs][width][2] from filters k at w[k*k_step + d*d_step]: zeros from `filters` on and
// behind an odd depth. The width is a multiple of the lanes.
struct PairSource {
  const bf16* w;
  int64_t k_step, d_step, depth;
};
void pack_pairs(const PairSource& source, int64_t filters, int64_t width, bf16* panel);

}  // namespace fastconv::FASTCONV_TARGET

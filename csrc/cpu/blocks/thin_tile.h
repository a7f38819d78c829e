// gemm_tile for a few rows, with filters read where they lie: what is used that often is not worth a packed panel.
#pragma once

#include "cpu/blocks/columns.h"
#include "cpu/blocks/gemm_tile.h"
#include "cpu/simd/half.h"

namespace fastconv::FASTCONV_TARGET {

// Rows up to which it is faster than packing and gemm_tile together. A block of kLanes columns and a sum for each row are in
// registers: 16 + 8 of 32 (AVX-512), 8 + 4 of 16.
inline constexpr int kThinRows = kVectorRegisters == 32 ? 8 : 4;

// Filters of a matrix whose depth is contiguous: filter k, depth d at w[k*k_step + d], stored as W.
template <class W>
struct ThinInput {
  const compute_t<W>* const* a;  // [rows], each [depth]
  const W* w;
  int64_t k_step;
  int filters;  // at most kLanes
  int64_t depth;
  ReadAhead ahead;
};

// One tile of 1 <= rows <= kThinRows by one vector of filters. Sums are the same chains of FMAs as gemm_tile's, so the bits are
// too.
template <class W>
void thin_tile(int rows, const ThinInput<W>& in, const TileOutput<compute_t<W>>& out);

// The same of a packed panel of halves, gemm_tile's but for how it is stored: depth d of filter k at w[d*width + k]. Widening a
// panel into the L2 first, from where few rows use it once, took 1.6 times as long as memory.
template <class W>
struct ThinPanel {
  const compute_t<W>* const* a;  // [rows], each [depth]
  const W* w;
  int64_t width, depth;
};
template <class W>
void thin_panel(int rows, int vectors, const ThinPanel<W>& in, const TileOutput<compute_t<W>>& out);

extern template void thin_panel(int, int, const ThinPanel<bf16>&, const TileOutput<float>&);
extern template void thin_panel(int, int, const ThinPanel<f16>&, const TileOutput<float>&);
extern template void thin_tile(int, const ThinInput<float>&, const TileOutput<float>&);
extern template void thin_tile(int, const ThinInput<double>&, const TileOutput<double>&);
extern template void thin_tile(int, const ThinInput<bf16>&, const TileOutput<float>&);
extern template void thin_tile(int, const ThinInput<f16>&, const TileOutput<float>&);

}  // namespace fastconv::FASTCONV_TARGET

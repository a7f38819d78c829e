// Packing pixels into the panels that gemm_tile reads as its vector operand, and finding where a panel's columns go in y: the two
// ends of filter_rows.
#pragma once

#include "cpu/blocks/gemm_tile.h"

namespace fastconv::FASTCONV_TARGET {

inline constexpr int kMaxColumns = 64;  // of a panel: four vectors of sixteen floats

// A stretch of a panel whose pixels are neighbours in one output row.
struct PixelRun {
  int32_t begin, end;  // columns of the panel
  int64_t n, p, q;     // of column `begin`
};

// Output pixels first .. first+count of the batch, as runs within output rows. Returns how many.
int find_runs(const Conv2dProblem& a, int64_t first, int64_t count, PixelRun* runs);

// The same pixels as pieces of y (filter 0). Whole planes without gaps give one piece a sample.
int find_pieces(const Conv2dProblem& a, int64_t first, int64_t count, ColumnPiece* pieces);

// Fills panel[((c*R + r)*S + s)*width + column] for channels 0 .. channels-1 of x; padding and columns past the last run are zero. The
// panel needs room for one vector more than channels*R*S*width.
template <class T>
void pack_pixels(const Conv2dProblem& a, const T* x, int64_t channels, const PixelRun* runs, int run_count, int64_t width, T* panel);

extern template void pack_pixels(const Conv2dProblem&, const float*, int64_t, const PixelRun*, int, int64_t, float*);
extern template void pack_pixels(const Conv2dProblem&, const double*, int64_t, const PixelRun*, int, int64_t, double*);

}  // namespace fastconv::FASTCONV_TARGET

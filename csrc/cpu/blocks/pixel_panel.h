// Packing pixels into the panels that gemm_tile reads as its vector operand, and finding where a panel's columns go in y: the two
// ends of filter_rows.
#pragma once

#include "cpu/blocks/gemm_tile.h"

namespace fastconv::FASTCONV_TARGET {

inline constexpr int kMaxColumns = 64;             // of a panel: four vectors of sixteen floats
inline constexpr int kMaxFills = kMaxColumns + 4;  // one for each run that ends within a vector, and the vectors

// A stretch of a panel whose pixels are neighbours in one output row.
struct PixelRun {
  int32_t begin, end;  // columns of the panel
  int64_t n, p, q;     // of column `begin`
};

// One vector's worth of a run under one filter column: lanes lo..hi-1 of panel[column ..] are x[row + offset + lane*step], the
// others padding. The same for every channel and filter row, so it is found once for a panel.
struct PixelFill {
  int64_t offset;
  int32_t column;
  int16_t run;
  int8_t lo, hi;
};

// Everything about a panel's pixels that does not depend on the channel.
struct PixelPanel {
  ColumnPiece pieces[kMaxColumns];  // of y, for filter 0. Planes without gaps give one piece a sample
  int32_t piece_count, run_count, fill_count, columns, vectors;
  PixelFill* fills;      // [S][fill_count]
  int64_t* row_offsets;  // [R][run_count]: of the input row that a run reads, or kOutside
  bool fetches;          // whether its runs are so long that fetching them ahead pays: 7x7 maps follow each other anyway
  bool copies;           // whether it is nothing but whole vectors that are neighbours in x, as in a 1x1 filter's planes
};
inline constexpr int64_t kOutside = INT64_MIN;

// Output pixels first .. first+columns of the batch as a panel of `vectors` vectors of `lanes`. fills has room for S*kMaxFills
// and row_offsets for R*kMaxColumns.
void describe_panel(const Conv2dProblem& a, int64_t first, int columns, int vectors, int lanes, PixelPanel& panel);

// Fills out[panel][(c*R + r)*S + s][column] for channels 0 .. channels-1 of x; panels are `panel_size` apart, rows as wide as
// their panel. Padding and the columns past the last pixel are zero. Up to one vector behind a panel's last row is overwritten.
//
// Channels come first and panels second: a channel's pixels are then read in runs of all panels, which the prefetcher follows;
// panel by panel, every 256 bytes would be on another page.
template <class T>
void pack_pixels(const Conv2dProblem& a, const T* x, int64_t channels, const PixelPanel* panels, int64_t panel_count,
                 int64_t panel_size, T* out);

extern template void pack_pixels(const Conv2dProblem&, const float*, int64_t, const PixelPanel*, int64_t, int64_t, float*);
extern template void pack_pixels(const Conv2dProblem&, const double*, int64_t, const PixelPanel*, int64_t, int64_t, double*);

}  // namespace fastconv::FASTCONV_TARGET

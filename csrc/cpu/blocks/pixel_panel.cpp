#include "cpu/blocks/pixel_panel.h"

#include "cpu/blocks/conv2d_geometry.h"
#include "cpu/blocks/load_pixels.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// The pixels as runs within output rows. Returns how many.
int find_runs(const Conv2dProblem& a, int64_t first, int64_t count, PixelRun* runs) {
  int64_t q = first % a.Q, p = first / a.Q % a.P, n = first / a.Q / a.P;
  int runs_found = 0;
  for (int32_t column = 0; column < count;) {
    const int64_t left = a.Q - q, length = left < count - column ? left : count - column;
    runs[runs_found++] = {column, int32_t(column + length), n, p, q};
    column += int32_t(length);
    q = 0;
    if (++p == a.P) p = 0, ++n;
  }
  return runs_found;
}

// The pixels as pieces of y. Returns how many.
int find_pieces(const Conv2dProblem& a, int64_t first, int64_t count, ColumnPiece* pieces) {
  const bool gapless = a.y.h == a.Q * a.y.w;
  const int64_t length = gapless ? a.P * a.Q : a.Q;  // pixels that follow each other y.w apart
  int found = 0;
  for (int64_t pixel = first; pixel < first + count;) {
    const int64_t in_stretch = pixel % length, left = length - in_stretch, rest = first + count - pixel;
    const int64_t size = left < rest ? left : rest;
    const int64_t q = pixel % a.Q, p = pixel / a.Q % a.P, n = pixel / a.Q / a.P;
    pieces[found++] = {int32_t(pixel - first), int32_t(pixel - first + size), n * a.y.n + p * a.y.h + q * a.y.w, a.y.w};
    pixel += size;
  }
  return found;
}

// The fills of all S filter columns. Returns how many each has.
int find_fills(const Conv2dProblem& a, const PixelRun* runs, int run_count, int lanes, PixelFill* fills) {
  int found = 0;
  for (int64_t s = 0; s < a.S; ++s) {
    const int64_t offset = s * a.dilation_w - a.pad_left;  // of the column that q = 0 reads
    const Range inside = outputs_inside(a.Q, a.stride_w, offset, a.W);
    for (int i = 0; i < run_count; ++i) {
      const PixelRun& run = runs[i];
      for (int32_t column = run.begin; column < run.end; column += lanes) {
        const int64_t q = run.q + column - run.begin, last = run.q + run.end - run.begin;
        const int64_t lo = clamp(inside.begin - q, 0, lanes), hi = clamp((inside.end < last ? inside.end : last) - q, lo, lanes);
        fills[found++] = {(q * a.stride_w + offset) * a.x.w, column, int16_t(i), int8_t(lo), int8_t(hi)};
      }
    }
  }
  return found / int(a.S);
}

// Channels from a plane's packing to its fetching: every plane is on pages of its own, to which the hardware's prefetchers do not
// follow. On one thread of a Zen 5, batch 8 (64 pixels of a plane at a time are few): 3x3 with stride 2 on 128 channels of 56x56
// 18.5 -> 11.8 ms, 256 -> 64 channels of 1x1 on 56x56 1.37 times as fast, 1024 -> 256 on 14x14 1.25.
FC_INLINE int64_t channels_ahead(const Conv2dProblem& a) { return a.R * a.S == 1 ? 8 : 2; }

}  // namespace

void describe_panel(const Conv2dProblem& a, int64_t first, int columns, int vectors, int lanes, PixelPanel& panel) {
  PixelRun runs[kMaxColumns];
  panel.columns = columns;
  panel.vectors = vectors;
  panel.run_count = find_runs(a, first, columns, runs);
  panel.piece_count = find_pieces(a, first, columns, panel.pieces);
  panel.fill_count = find_fills(a, runs, panel.run_count, lanes, panel.fills);
  for (int64_t r = 0; r < a.R; ++r) {
    for (int i = 0; i < panel.run_count; ++i) {
      const int64_t h = runs[i].p * a.stride_h - a.pad_top + r * a.dilation_h;
      const bool inside = uint64_t(h) < uint64_t(a.H);
      panel.row_offsets[r * panel.run_count + i] = inside ? runs[i].n * a.x.n + h * a.x.h : kOutside;
    }
  }
  panel.copies = a.R * a.S == 1 && a.stride_w * a.x.w == 1 && panel.run_count == 1 && columns == vectors * lanes &&
                 panel.row_offsets[0] != kOutside;
  panel.fetches = panel.fill_count <= 2 * vectors;
  for (int f = 0; f < panel.fill_count; ++f) panel.copies &= panel.fills[f].lo == 0 && panel.fills[f].hi == lanes;
}

template <class T>
void pack_pixels(const Conv2dProblem& a, const T* x, int64_t channels, const PixelPanel* panels, int64_t panel_count,
                 int64_t panel_size, T* out) {
  constexpr int kL = kLanes<T>;
  const int64_t step = a.stride_w * a.x.w, ahead = channels_ahead(a) * a.x.c;
  for (int64_t c = 0; c < channels; ++c, x += a.x.c) {
    for (int64_t i = 0; i < panel_count; ++i) {
      const PixelPanel& panel = panels[i];
      const int64_t width = int64_t(panel.vectors) * kL;
      T* row = out + i * panel_size + c * a.R * a.S * width;
      if (panel.copies) {
        // A third of the time of going through the fills, and with 64 filters packing is a sixth of all.
        const T* from = x + panel.row_offsets[0] + panel.fills[0].offset;
        for (int v = 0; v < panel.vectors; ++v) {
          __builtin_prefetch(from + v * kL + ahead);
          store(row + v * kL, load(from + v * kL));
        }
        continue;
      }
      for (int64_t r = 0; r < a.R; ++r) {
        const int64_t* row_offsets = panel.row_offsets + r * panel.run_count;
        const PixelFill* fill = panel.fills;
        for (int f = 0; panel.fetches && f < panel.fill_count; ++f) {
          const int64_t offset = row_offsets[fill[f].run];
          if (offset == kOutside) continue;
          const T* const next = x + ahead + offset + fill[f].offset;
          __builtin_prefetch(next);
          if (step != 1) __builtin_prefetch(next + kL);
        }
        for (int64_t s = 0; s < a.S; ++s, row += width) {
          // Whole vectors are stored from left to right: what spills over a run's end is overwritten by the next one.
          for (int f = 0; f < panel.fill_count; ++f, ++fill) {
            const int64_t offset = row_offsets[fill->run];
            store(row + fill->column,
                  offset == kOutside ? zero<T>() : load_pixels(x + offset + fill->offset, step, fill->lo, fill->hi));
          }
          for (int64_t column = panel.columns; column < width; column += kL) store(row + column, zero<T>());
        }
      }
    }
  }
}

template void pack_pixels(const Conv2dProblem&, const float*, int64_t, const PixelPanel*, int64_t, int64_t, float*);
template void pack_pixels(const Conv2dProblem&, const double*, int64_t, const PixelPanel*, int64_t, int64_t, double*);

}  // namespace fastconv::FASTCONV_TARGET

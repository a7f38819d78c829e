#include "cpu/blocks/pixel_panel.h"

#include "cpu/blocks/conv2d_geometry.h"

namespace fastconv::FASTCONV_TARGET {

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

template <class T>
void pack_pixels(const Conv2dProblem& a, const T* x, int64_t channels, const PixelRun* runs, int run_count, int64_t width, T* panel) {
  constexpr int kL = kLanes<T>;
  const int64_t step = a.stride_w * a.x.w;
  const int32_t filled = runs[run_count - 1].end;
  for (int64_t c = 0; c < channels; ++c, x += a.x.c) {
    for (int64_t r = 0; r < a.R; ++r) {
      for (int64_t s = 0; s < a.S; ++s, panel += width) {
        const int64_t offset = s * a.dilation_w - a.pad_left;  // of the column that q = 0 reads
        const Range inside = outputs_inside(a.Q, a.stride_w, offset, a.W);
        // Whole vectors are stored from left to right: what spills over a run's end is overwritten by the next one.
        for (int i = 0; i < run_count; ++i) {
          const PixelRun& run = runs[i];
          const int64_t h = run.p * a.stride_h - a.pad_top + r * a.dilation_h;
          const bool row_inside = uint64_t(h) < uint64_t(a.H);
          const T* row = x + run.n * a.x.n + h * a.x.h + offset * a.x.w;
          for (int32_t column = run.begin; column < run.end; column += kL) {
            vec<T> pixels = zero<T>();
            if (row_inside) {
              const int64_t q = run.q + column - run.begin, last = run.q + run.end - run.begin;
              const int64_t lo = clamp(inside.begin - q, 0, kL), hi = clamp((inside.end < last ? inside.end : last) - q, 0, kL);
              const T* from = row + q * step;
              if (step != 1) {
                for (int64_t lane = lo; lane < hi; ++lane) pixels.v[lane] = from[lane * step];
              } else if (hi - lo == kL) {
                pixels = load(from);
              } else {
                pixels = load_range(from, int(lo), int(hi));
              }
            }
            store(panel + column, pixels);
          }
        }
        for (int64_t column = filled; column < width; column += kL) store(panel + column, zero<T>());
      }
    }
  }
}

template void pack_pixels(const Conv2dProblem&, const float*, int64_t, const PixelRun*, int, int64_t, float*);
template void pack_pixels(const Conv2dProblem&, const double*, int64_t, const PixelRun*, int, int64_t, double*);

}  // namespace fastconv::FASTCONV_TARGET

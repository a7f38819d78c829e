// What the rows of a GEMM tile read where rows are output pixels: the reduction cut into blocks of taps and channels, and a
// pointer for each pixel and tap.
#pragma once

#include "core/problem.h"
#include "cpu/blocks/conv2d_geometry.h"
#include "cpu/blocks/gemm_tile.h"
#include "cpu/blocks/split.h"

namespace fastconv::FASTCONV_TARGET {

// Elements of the reduction between two visits to y. A panel of 64 floats x 1536 is 384 KB: within the L2 of 1 MB of every
// AVX-512 server, from which it streams at 21 bytes a cycle, a third of what L2 gives. It is a constant, not the machine's cache
// size, because it fixes the order of the sum (law 7).
inline constexpr int64_t kMaxDepth = 1536;
// The reduction of one group, cut into blocks. A "tap" is one filter row when x has no gaps between columns and all of it fits
// (S*C elements in one run, so that a stem with three channels has an inner loop of 21, not 3) and one filter position otherwise.
// A block that is too long loses channels, not taps: filters are packed along their memory, where all taps of a channel are
// neighbours, and packing a third of them costs three times as much an element (512 -> 512 channels of 3x3 on 7x7 maps at batch
// 1: 45 against 75 GFLOP/s).
struct Reduction {
  bool whole_rows;
  int64_t depth;         // elements of one tap
  EvenSplit chunks;      // of those elements
  EvenSplit tap_groups;  // of the taps
  int64_t taps_per_block, blocks;

  explicit FC_INLINE Reduction(const Conv2dProblem& a)
      : whole_rows(a.S > 1 && a.dilation_w == 1 && a.groups == 1 && a.x.w == a.C && a.S * a.C <= kMaxDepth &&
                   (a.R * a.S * a.C <= kMaxDepth || a.C < kLanes<float>)),
        depth(whole_rows ? a.S * a.C : a.C / a.groups),
        chunks(depth, whole_rows              ? kMaxDepth
                      : a.R * a.S < kMaxDepth ? kMaxDepth / (a.R * a.S)
                                              : 1),
        tap_groups(whole_rows ? a.R : a.R * a.S, kMaxDepth / chunks.largest()),
        taps_per_block(tap_groups.largest()),
        blocks(tap_groups.parts * chunks.parts) {}
};

// One block of the reduction: taps first .. first+taps of the filter, elements begin .. begin+depth of each.
struct Block {
  int64_t first, taps, begin, depth;
  int64_t r, s;  // filter position of tap `first`, where taps are positions
  bool within;   // 1x1 without padding: no pixel is outside
};

FC_INLINE Block block_at(const Conv2dProblem& a, const Reduction& reduction, int64_t index) {
  const int64_t group = index % reduction.tap_groups.parts, chunk = index / reduction.tap_groups.parts;
  const int64_t first = reduction.tap_groups.begin(group);
  return {first,
          reduction.tap_groups.size(group),
          reduction.chunks.begin(chunk),
          reduction.chunks.size(chunk),
          first / a.S,
          first % a.S,
          a.R * a.S == 1 && a.pad_top == 0 && a.pad_left == 0 && (a.P - 1) * a.stride_h < a.H && (a.Q - 1) * a.stride_w < a.W};
}

// Pointers of one tile, in scratch memory.
template <class T>
struct TilePointers {
  const T** rows;     // [taps of a block][rows of a tile]
  T* zeros;           // [depth]: what padding reads
  T* edges;           // [rows of a tile][taps of a block][depth]: filter rows that stick out to the left or right
  int64_t* x_offset;  // [taps of a block]: from what a pixel reads first to the tap, where nothing sticks out

  TilePointers(Arena& arena, const Reduction& reduction) {
    const int64_t depth = reduction.chunks.largest(), taps = reduction.taps_per_block;
    rows = arena.take<const T*>(taps * GemmTile::kMaxRows);
    zeros = arena.take<T>(depth);
    edges = arena.take<T>(reduction.whole_rows ? GemmTile::kMaxRows * taps * depth : 0);
    x_offset = arena.take<int64_t>(taps);
  }
};

template <class T>
FC_INLINE void find_offsets(const Conv2dProblem& a, const Reduction& reduction, const Block& block, const TilePointers<T>& to) {
  for (int64_t t = 0; t < block.taps; ++t) {
    const int64_t tap = block.first + t, r = reduction.whole_rows ? tap : tap / a.S, s = reduction.whole_rows ? 0 : tap % a.S;
    to.x_offset[t] = r * a.dilation_h * a.x.h + s * a.dilation_w * a.x.w;
  }
}

// Pointers to what output pixel `pixel` reads, for every tap of the block.
template <class T>
FC_INLINE void point_row(const Conv2dProblem& a, const Reduction& reduction, const Block& block, const T* x, int64_t n, int64_t p,
                         int64_t q, int rows, int m, const TilePointers<T>& to) {
  const int64_t top = p * a.stride_h - a.pad_top, left = q * a.stride_w - a.pad_left;
  x += n * a.x.n;
  if (block.within) {
    to.rows[m] = x + top * a.x.h + left * a.x.w + block.begin;
    return;
  }
  if (!reduction.whole_rows) {
    int64_t r = block.r, s = block.s;
    for (int64_t t = 0; t < block.taps; ++t) {
      const int64_t h = top + r * a.dilation_h, w = left + s * a.dilation_w;
      const bool inside = uint64_t(h) < uint64_t(a.H) && uint64_t(w) < uint64_t(a.W);
      to.rows[t * rows + m] = inside ? x + h * a.x.h + w * a.x.w + block.begin : to.zeros;
      if (++s == a.S) s = 0, ++r;
    }
    return;
  }
  const bool sticks_out = left < 0 || left + a.S > a.W;
  for (int64_t t = 0; t < block.taps; ++t) {
    const int64_t h = top + (block.first + t) * a.dilation_h;
    const T** row = &to.rows[t * rows + m];
    if (uint64_t(h) >= uint64_t(a.H)) {
      *row = to.zeros;
    } else if (!sticks_out) {
      *row = x + h * a.x.h + left * a.x.w;
    } else {
      T* edge = to.edges + (m * block.taps + t) * block.depth;
      const int64_t begin = clamp(-left, 0, a.S) * a.C, end = clamp(a.W - left, 0, a.S) * a.C;
      const T* source = x + h * a.x.h + left * a.x.w;
      for (int64_t i = 0; i < begin; ++i) edge[i] = T(0);
      for (int64_t i = begin; i < end; i += kLanes<T>) {
        const int lanes = end - i < kLanes<T> ? int(end - i) : kLanes<T>;
        store(edge + i, load(source + i, lanes), lanes);
      }
      for (int64_t i = end > begin ? end : begin; i < block.depth; ++i) edge[i] = T(0);
      *row = edge;
    }
  }
}

// An output pixel.
struct Pixel {
  int64_t n, p, q;
};

// Where the rows of a tile read and write: output pixels from `pixel` on, which becomes the pixel after them. True where
// `x_offset` leads from one pointer of each row to its taps; false where each tap has its own.
//
// Tiles within one row of y that read no padding are most of a map, and their pointers are one addition each: pointing at every
// tap of every pixel took 43 % of a 3x3 stem's time.
template <class T>
FC_INLINE bool point_tile(const Conv2dProblem& a, const Reduction& reduction, const Block& block, const T* x, T* y, int rows,
                          Pixel& pixel, const TilePointers<T>& to, T** y_rows) {
  auto& [n, p, q] = pixel;
  const int64_t top = p * a.stride_h - a.pad_top, left = q * a.stride_w - a.pad_left;
  if (q + rows <= a.Q && top >= 0 && top + (a.R - 1) * a.dilation_h < a.H && left >= 0 &&
      left + (rows - 1) * a.stride_w + (a.S - 1) * a.dilation_w < a.W) {
    const T* from = x + n * a.x.n + top * a.x.h + left * a.x.w + block.begin;
    T* at = y + n * a.y.n + p * a.y.h + q * a.y.w;
    const int64_t step = a.stride_w * a.x.w;
    for (int m = 0; m < rows; ++m, from += step, at += a.y.w) to.rows[m] = from, y_rows[m] = at;
    q += rows;
    if (q == a.Q) {
      q = 0;
      if (++p == a.P) p = 0, ++n;
    }
    return true;
  }
  for (int m = 0; m < rows; ++m) {
    point_row(a, reduction, block, x, n, p, q, rows, m, to);
    y_rows[m] = y + n * a.y.n + p * a.y.h + q * a.y.w;
    if (++q == a.Q) {
      q = 0;
      if (++p == a.P) p = 0, ++n;
    }
  }
  return false;
}

// 1x1 filters on images without gaps: one row of pixels, which no tile leaves.
inline Conv2dProblem as_one_row(const Conv2dProblem& a) {
  const auto dense = [&](const Stride4& s) { return s.h == a.W * s.w && (a.N == 1 || s.n == a.H * s.h); };
  const bool plain =
      a.R * a.S == 1 && a.stride_h == 1 && a.stride_w == 1 && a.pad_top == 0 && a.pad_left == 0 && a.P == a.H && a.Q == a.W;
  if (!plain || !dense(a.x) || !dense(a.y)) return a;
  Conv2dProblem row = a;
  row.W = row.Q = a.N * a.P * a.Q;
  row.N = row.H = row.P = 1;
  return row;
}

}  // namespace fastconv::FASTCONV_TARGET

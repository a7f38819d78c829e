// The steps of a recurrent layer: in each, the state times weights that all steps share, and then a cell on the gates of a unit.
//
// Both are cut by hidden units: a task multiplies what its units' gates need, in tiles that stay in the L1, and runs their cells
// on it, so that threads meet once a step. Weights are packed once for all steps. A sum is a chain of FMAs over a block of its
// depth, and the blocks are added in order: neither batch nor threads show.
#pragma once

#include "cpu/blocks/gemm_tile.h"
#include "cpu/blocks/parallel.h"
#include "cpu/blocks/split.h"

namespace fastconv::FASTCONV_TARGET {

// Depths of a product's block: 512 of four vectors are 128 KB of panel, which stay in the L2 while all rows of a batch meet them.
inline constexpr int64_t kStepDepth = 512;
// Rows whose sums are kept before their cells run: eight tiles of six, 12 KB of an L1.
inline constexpr int64_t kStepRows = 48;
// A task is at least this many products, 2 us of work, so that small layers do not wake a thread in every step.
inline constexpr int64_t kTaskProducts = 1 << 18;

// Vectors of a panel, where more than `wanted` are of no use. Weights of more than the L2 come from the L3 in every step, at
// about 16 bytes a cycle: a batch that fits into one tile of two vectors, ten rows, meets them once on their way, where two tiles
// of four vectors first wait for them and then compute (8 x 512 units of LSTM: 112 us a step, and 92).
FC_INLINE int panel_vectors(int64_t batch, int wanted) {
  const int most = wanted < GemmTile::kMaxVectors ? wanted : GemmTile::kMaxVectors;
  return batch > GemmTile::rows(most) && batch <= GemmTile::rows(2) ? 2 : most;
}

// sums[m*stride + column] = sum over d of rows[m*row_step + d] * panel[d*width + column], for width = vectors of T.
template <class T>
FC_INLINE void step_product(const T* rows, int64_t row_step, int64_t count, const T* panel, int vectors, int64_t depth,
                            int64_t stride, T* sums) {
  const int64_t width = vectors * kLanes<T>;
  const EvenSplit blocks(depth, kStepDepth), tiles(count, GemmTile::rows(vectors));
  const ColumnPiece piece = {0, int32_t(width), 0, 1};
  for (int64_t b = 0; b < blocks.parts; ++b) {
    for (int64_t tile = 0; tile < tiles.parts; ++tile) {
      const T* a[GemmTile::kMaxRows];
      T* y[GemmTile::kMaxRows];
      const int size = int(tiles.size(tile));
      for (int m = 0; m < size; ++m) {
        a[m] = rows + (tiles.begin(tile) + m) * row_step + blocks.begin(b);
        y[m] = sums + (tiles.begin(tile) + m) * stride;
      }
      const TileInput<T> in = {a, 1, panel + blocks.begin(b) * width, width, 1, blocks.size(b)};
      gemm_tile(size, vectors, in, {y, &piece, 1, b > 0, false, Activation::none, nullptr, nullptr, nullptr, nullptr});
    }
  }
}

// Calls body(block) for every block of units, on threads where they have enough to do. Every other step begins where the last one
// ended, with weights that the L2 still holds: of 1 MB of them, an L2 of 1 MB would otherwise hold none when it is asked.
template <class Body>
FC_INLINE void for_each_block_of(const Context& context, int64_t blocks, int64_t products, int64_t step, const Body& body) {
  const EvenSplit tasks(blocks, products < kTaskProducts ? kTaskProducts / (products > 0 ? products : 1) + 1 : 1);
  parallel_ranges(context, tasks.parts, [&](int, int64_t begin, int64_t end) {
    const int64_t first = tasks.begin(begin), last = tasks.begin(end);
    for (int64_t i = first; i < last; ++i) body(step % 2 == 0 ? i : first + last - 1 - i);
  });
}

// The place in memory of the step that comes i-th.
FC_INLINE int64_t place_of(const RecurrentProblem& a, int64_t i) { return a.reverse ? a.L - 1 - i : i; }

// The units of a block of one vector: from `unit` on n of them.
template <class T>
struct Units {
  int64_t unit;
  int n;
  FC_INLINE Units(const RecurrentProblem& a, int64_t block)
      : unit(block * kLanes<T>), n(a.H - unit < kLanes<T> ? int(a.H - unit) : kLanes<T>) {}
};

// Predicted seconds, where a product of `gates` H x H and B x H takes most of the time: 80 % of the peak, and 60 cycles a vector
// of cells.
template <class T>
FC_INLINE double steps_cost(const RecurrentProblem& a, int gates, const Machine& machine) {
  const double vectors = double(a.L) * double(a.B) * double((a.H + kLanes<T> - 1) / kLanes<T>);
  return vectors * (double(gates) * double(a.H) / (2 * 0.8) + 60) / (3e9 * machine.threads);
}

FC_INLINE const char* steps_reject(const RecurrentProblem& a) {
  return a.L <= 0 || a.B <= 0 || a.H <= 0 ? "there is nothing to step through" : nullptr;
}

}  // namespace fastconv::FASTCONV_TARGET

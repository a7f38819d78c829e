// The backward pass of a recurrent layer, for any cell: the gradients of a step's products times the weights, transposed, are
// what flows into the state before it. Blocks of units are as wide as a tile.
//
//   struct Cell {
//     static constexpr int kGates;
//     // (L, B, kGates*H), which the calls below write.
//     const T* dproduct() const;
//     // What the cell of a row will read from far away.
//     void fetch(int64_t row, const Units<T>& units) const;
//     // `sum` is a vector of units of a row of the products, absent in the last step.
//     void operator()(const T* sum, int64_t row, const Units<T>& units) const;
//     // The same into the gradient of the state that came first.
//     void first(const T* sum, int64_t row, const Units<T>& units) const;
//   };
#pragma once

#include "cpu/blocks/recurrence.h"

namespace fastconv::FASTCONV_TARGET {

// The weights as panels [gate and unit of the product][unit], whose width is that of their block.
template <class T>
struct UnitPanels {
  EvenSplit vectors;
  int64_t H, depth;
  FC_INLINE UnitPanels(const RecurrentProblem& a, int gates)
      : vectors((a.H + kLanes<T> - 1) / kLanes<T>, panel_vectors(a.B, GemmTile::kMaxVectors)), H(a.H), depth(gates * a.H) {}

  FC_INLINE const T* panel(const T* packed, int64_t block) const { return packed + vectors.begin(block) * kLanes<T> * depth; }
  FC_INLINE void pack(const T* w, int64_t block, T* packed) const {
    const int64_t first = vectors.begin(block) * kLanes<T>;
    T* to = packed + first * depth;
    for (int64_t d = 0; d < depth; ++d) {
      for (int64_t v = 0; v < vectors.size(block); ++v, to += kLanes<T>) {
        const int64_t unit = first + v * kLanes<T>;
        store(to, load_some(w + d * H + unit, H - unit < kLanes<T> ? int(H - unit) : kLanes<T>));
      }
    }
  }
};

template <class T, class Cell>
FC_INLINE void run_steps_back(const RecurrentProblem& a, const RecurrentArgs& args, const Context& context) {
  const UnitPanels<T> panels(a, Cell::kGates);
  const int64_t blocks = panels.vectors.parts, products = panels.vectors.largest() * kLanes<T> * panels.depth;
  T* const packed = static_cast<T*>(context.workspace);
  for_each_block_of(context, blocks, 4 * products, 0,
                    [&](int64_t block) { panels.pack(static_cast<const T*>(args.w), block, packed); });
  // Step -1 is the state that came first, which has no cell.
  for (int64_t step = a.L - 1; step >= -1; --step) {
    const Cell cell(a, args, step);
    const T* const dproduct = step + 1 < a.L ? cell.dproduct() + place_of(a, step + 1) * a.B * panels.depth : nullptr;
    for_each_block_of(context, blocks, a.B * products, step + 1, [&](int64_t block) {
      constexpr int64_t kStride = GemmTile::kMaxVectors * kLanes<T>;
      alignas(64) T sums[kStepRows * kStride];
      const int vectors = int(panels.vectors.size(block));
      for (int64_t row = 0; row < a.B; row += kStepRows) {
        const int64_t count = a.B - row < kStepRows ? a.B - row : kStepRows;
        for (int64_t m = 0; step >= 0 && m < count; ++m) {
          for (int v = 0; v < vectors; ++v) cell.fetch(row + m, Units<T>(a, panels.vectors.begin(block) + v));
        }
        if (dproduct) {
          step_product(dproduct + row * panels.depth, panels.depth, count, panels.panel(packed, block), vectors, panels.depth,
                       kStride, sums);
        }
        for (int64_t m = 0; m < count; ++m) {
          for (int v = 0; v < vectors; ++v) {
            const Units<T> units(a, panels.vectors.begin(block) + v);
            const T* const sum = dproduct ? sums + m * kStride + v * kLanes<T> : nullptr;
            if (step < 0) {
              cell.first(sum, row + m, units);
            } else {
              cell(sum, row + m, units);
            }
          }
        }
      }
    });
  }
}

template <class T, class Cell>
int64_t steps_back_workspace(const RecurrentProblem& a, const Machine&) {
  return round_up(a.H, kLanes<T>) * Cell::kGates * a.H * int64_t(sizeof(T));
}

}  // namespace fastconv::FASTCONV_TARGET

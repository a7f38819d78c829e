// The forward pass of a recurrent layer, for any cell: a block of units is a vector of them, whose gates lie side by side.
//
//   struct Cell {
//     static constexpr int kGates;
//     // What the cell of a row will read from far away.
//     void fetch(int64_t row, int64_t place, const Units<T>& units) const;
//     // A row of the state's products, [kGates][lanes], to the units' next state.
//     void operator()(const T* sums, int64_t row, int64_t place, const Units<T>& units) const;
//   };
#pragma once

#include "cpu/blocks/columns.h"
#include "cpu/blocks/recurrence.h"
#include "cpu/blocks/thin_tile.h"

namespace fastconv::FASTCONV_TARGET {

// A block's gates are cut into panels that a tile's registers can hold.
template <class T, int kGates>
struct GatePanels {
  EvenSplit parts;
  int64_t depth;
  FC_INLINE explicit GatePanels(const RecurrentProblem& a) : parts(kGates, panel_vectors(a.B, kGates)), depth(a.H) {}
  FC_INLINE int64_t block_size() const { return kGates * kLanes<T> * depth; }

  // The panels of a block of units, one after the other: [part][depth][gate of the part][lane].
  FC_INLINE void pack(const T* w, const Units<T>& units, T* panel) const {
    for (int64_t part = 0; part < parts.parts; panel += parts.size(part) * kLanes<T> * depth, ++part) {
      const int64_t width = parts.size(part) * kLanes<T>;
      for (int64_t gate = 0; gate < parts.size(part); ++gate) {
        const T* rows = w + ((parts.begin(part) + gate) * depth + units.unit) * depth;
        T* const to = panel + gate * kLanes<T>;
        for_each_column(rows, depth, units.n, depth, [&](int64_t d, vec<T> column) { store(to + d * width, column); });
      }
    }
  }
  FC_INLINE void multiply(const T* h, int64_t count, const T* panel, T* sums) const {
    for (int64_t part = 0; part < parts.parts; panel += parts.size(part) * kLanes<T> * depth, ++part) {
      step_product(h, depth, count, panel, int(parts.size(part)), depth, kGates * kLanes<T>,
                   sums + parts.begin(part) * kLanes<T>);
    }
  }
};

// A packed element costs as much as its use by sixteen rows, and one that is read where it lies serves as many rows as thin_tile
// takes: so few steps are not worth packing for. The sums are the same chains.
FC_INLINE bool few_steps(const RecurrentProblem& a) { return a.L * ((a.B + kThinRows - 1) / kThinRows) < 4; }

template <class T>
FC_INLINE void multiply_in_place(const T* h, int64_t count, const T* w, int64_t depth, const Units<T>& units, int gates,
                                 T* sums) {
  const EvenSplit blocks(depth, kStepDepth), tiles(count, kThinRows);
  const ColumnPiece piece = {0, units.n, 0, 1};
  for (int gate = 0; gate < gates; ++gate) {
    for (int64_t tile = 0; tile < tiles.parts; ++tile) {
      for (int64_t b = 0; b < blocks.parts; ++b) {
        const T* a[kThinRows];
        T* y[kThinRows];
        const int size = int(tiles.size(tile));
        for (int m = 0; m < size; ++m) {
          a[m] = h + (tiles.begin(tile) + m) * depth + blocks.begin(b);
          y[m] = sums + ((tiles.begin(tile) + m) * gates + gate) * kLanes<T>;
        }
        const ThinInput<T> in = {a, w + (gate * depth + units.unit) * depth + blocks.begin(b), depth, units.n, blocks.size(b)};
        thin_tile<T>(size, in, {y, &piece, 1, b > 0, false, Activation::none, nullptr, nullptr, nullptr, nullptr});
      }
    }
  }
}

template <class T, class Cell>
FC_INLINE void run_steps(const RecurrentProblem& a, const RecurrentArgs& args, const Context& context) {
  constexpr int kGates = Cell::kGates;
  const GatePanels<T, kGates> panels(a);
  const int64_t blocks = (a.H + kLanes<T> - 1) / kLanes<T>;
  const T* const w = static_cast<const T*>(args.w);
  T *const packed = static_cast<T*>(context.workspace), *const y = static_cast<T*>(args.y);
  const bool in_place = few_steps(a);
  if (!in_place) {
    for_each_block_of(context, blocks, 16 * panels.block_size(), 0,
                      [&](int64_t block) { panels.pack(w, Units<T>(a, block), packed + block * panels.block_size()); });
  }
  for (int64_t step = 0; step < a.L; ++step) {
    const int64_t place = place_of(a, step);
    const T* const h = step ? y + place_of(a, step - 1) * a.B * a.H : static_cast<const T*>(args.h);
    const Cell cell(a, args, h, step);
    for_each_block_of(context, blocks, a.B * panels.block_size(), step, [&](int64_t block) {
      const Units<T> units(a, block);
      alignas(64) T sums[kStepRows * kGates * kLanes<T>];
      for (int64_t row = 0; row < a.B; row += kStepRows) {
        const int64_t count = a.B - row < kStepRows ? a.B - row : kStepRows;
        for (int64_t m = 0; m < count; ++m) cell.fetch(row + m, place, units);
        if (in_place) {
          multiply_in_place(h + row * a.H, count, w, a.H, units, kGates, sums);
        } else {
          panels.multiply(h + row * a.H, count, packed + block * panels.block_size(), sums);
        }
        for (int64_t m = 0; m < count; ++m) cell(sums + m * kGates * kLanes<T>, row + m, place, units);
      }
    });
  }
}

template <class T, class Cell>
int64_t steps_workspace(const RecurrentProblem& a, const Machine&) {
  return few_steps(a) ? 0 : round_up(a.H, kLanes<T>) * Cell::kGates * a.H * int64_t(sizeof(T));
}

}  // namespace fastconv::FASTCONV_TARGET

// Lines whose vectors run over channels (NHWC): a line is [vector of filters][input][column modulo dilation][column][lane].
//
// A filter has as many inputs as its group has channels: one in a depthwise convolution. Lane i of input j is what the filter of
// that lane multiplies with its weights of channel j, so a filter's lane meets its own group's channels and no other's. In this
// form a grouped convolution is a depthwise one with (inputs * R) rows of the filter, whatever the sizes of its groups.
#pragma once

#include "cpu/blocks/depthwise_lines.h"

namespace fastconv::FASTCONV_TARGET {

// Lines with several inputs are several times as large as x, and a tile reads them as fast as the L1 gives; they should stay in
// it.
inline constexpr int64_t kExpandedBytes = 20 * 1024;
// What the lines of one vector may take where it makes several rows of y at a time, which read most of them again.
inline constexpr int64_t kLinesInL1 = 24 * 1024;

// How the lanes of a tile get their groups' channels from a line.
//
// Writing every input of every filter out takes as many stores as there are inputs, and 30 columns of three rows of 8 inputs are
// 46 KB. Where a group's channels and filters are as many as divide a vector, a vector of x holds just the channels that a vector
// of filters reads, and a permutation in registers takes the place of a load, on the port of every second FMA; where they are a
// vector, every lane reads the same channel, which a load broadcasts.
enum class LaneInput { copied, permuted, broadcast };

template <class T>
FC_INLINE LaneInput lane_input(const Conv2dProblem& a) {
  const int64_t inputs = a.C == a.groups ? 1 : a.C / a.groups;
  if (a.C != a.K || inputs == 1) return LaneInput::copied;
  return inputs == kLanes<T>                             ? LaneInput::broadcast
         : inputs < kLanes<T> && kLanes<T> % inputs == 0 ? LaneInput::permuted
                                                         : LaneInput::copied;
}

// pick[row][lane]: which lane of x a permutation takes for input `row % inputs`, the channel of that number of the lane's group.
template <class T>
FC_INLINE void fill_pick(int64_t rows, int64_t inputs, typename index_vec<T>::Int* pick) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < kLanes<T>; ++i) {
      pick[row * kLanes<T> + i] = typename index_vec<T>::Int(i / inputs * inputs + row % inputs);
    }
  }
}

// How K, Q are cut into blocks whose lines fit kLineBytes. `pixels` is the width of a register tile. With `dilation` above 1 the
// columns of one residue lie side by side, so that a dilated row is as many dense ones.
template <class T>
struct ChannelBlocks {
  int64_t inputs;        // of a filter, that are copied
  int64_t vectors;       // of all K channels
  EvenSplit of_vectors;  // into blocks of channels
  int64_t q_size, q_blocks;
  int64_t dilation;   // of which the residues are apart
  int64_t columns;    // of a line, or of one of its residues
  int64_t tile_rows;  // of y that one vector of filters makes before the next
  LineWindow window;

  FC_INLINE ChannelBlocks(const Conv2dProblem& a, int64_t pixels, int64_t dilation_, int64_t most_rows, LaneInput input)
      : inputs(input != LaneInput::copied || a.C == a.groups ? 1 : a.C / a.groups),
        vectors((a.K + kLanes<T> - 1) / kLanes<T>),
        of_vectors(vectors, 1),
        dilation(dilation_),
        tile_rows(1),
        window(a, 1) {
    const int64_t bytes = inputs == 1 ? kLineBytes : kExpandedBytes;
    const int64_t column_bytes = window.slots * inputs * kVectorBytes, tail = (a.S - 1) * a.dilation_w + 1;
    // At least two vectors, 128 bytes: x comes in pairs of cache lines.
    const int64_t fewest = vectors < 2 || inputs > 1 ? 1 : 2, step = pixels * dilation;
    int64_t most_q = divide(clamp(divide(bytes, column_bytes * fewest) - tail, 0, bytes), a.stride_w) + 1;
    most_q = most_q < 2 * step ? 2 * step : divide(most_q, step) * step;
    q_blocks = divide(a.Q + most_q - 1, most_q);
    q_size = divide(divide(a.Q + q_blocks - 1, q_blocks) + step - 1, step) * step;
    q_blocks = divide(a.Q + q_size - 1, q_size);
    columns = dilation > 1 ? q_size / dilation + a.S - 1 : (q_size - 1) * a.stride_w + tail;
    of_vectors = EvenSplit(vectors, clamp(divide(bytes, column_bytes * columns * dilation), fewest, vectors));
    if (a.dilation_h > 1) return;
    const int64_t lines = divide(kLinesInL1, inputs * input_size() * int64_t(sizeof(T)));
    tile_rows = clamp(divide(clamp(lines - a.R, 0, lines), a.stride_h) + 1, 1, a.P < most_rows ? a.P : most_rows);
    window = LineWindow(a, tile_rows);
  }
  // Elements of one input of one vector.
  FC_INLINE int64_t input_size() const { return dilation * columns * kLanes<T>; }
  FC_INLINE int64_t line_size() const { return of_vectors.largest() * inputs * input_size(); }
};

// --- transform: columns of a row of x to a line

// As many channels as filters, in their order. Pixels are the outer loop, so that x is read from one end to the other, which is
// what prefetchers follow: 96 channels of 112x112 took 1.2 times as long with four vectors of every pixel, then the next four.
template <class T>
FC_INLINE void copy_depthwise(const Conv2dProblem& a, const T* from, int64_t from_step, int64_t count, int64_t k0,
                              int64_t vectors, T* to, int64_t vector_step) {
  constexpr int kL = kLanes<T>;
  from += k0;
  const int last = int(clamp(a.K - k0 - (vectors - 1) * kL, 0, kL));
  const int64_t full = last < kL ? vectors - 1 : vectors, tail = full % 4;
  for (int64_t j = 0; j < count; ++j, from += from_step, to += kL) {
    const T* x = from;
    T* line = to;
    for (int64_t v = full; v >= 4; v -= 4, x += 4 * kL, line += 4 * vector_step) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) store(line + i * vector_step, load(x + i * kL));
    }
    for (int64_t v = 0; v < tail; ++v, x += kL, line += vector_step) store(line, load(x));
    if (full < vectors) store(line, load(x, last));
  }
}

// Which channel each lane of a vector of filters reads as its first input.
template <class T>
struct LaneChannels {
  int64_t first;                               // channel of lane 0
  typename index_vec<T>::Int from[kLanes<T>];  // the others, counted from it
  int64_t span;                                // channels from the first that the lanes read, all inputs
  int pieces;                                  // runs of lanes of one group
  int begin[kLanes<T>];                        // of each

  FC_INLINE LaneChannels(const Conv2dProblem& a, int64_t k0, int64_t inputs) {
    const int64_t filters = a.K / a.groups;
    int64_t g = divide(k0, filters), f = k0 - g * filters, offset = 0;
    first = g * inputs;
    pieces = 0;
    for (int i = 0; i < kLanes<T>; ++i) {
      if (i == 0 || (f == 0 && k0 + i < a.K)) begin[pieces++] = i;
      from[i] = typename index_vec<T>::Int(offset);
      if (++f == filters && i + 1 < kLanes<T> && k0 + i + 1 < a.K) f = 0, offset += inputs;
    }
    span = offset + inputs;
  }
};

// One vector of filters, whose lanes read the channels of their groups.
template <class T>
__attribute__((noinline)) void copy_grouped(const Conv2dProblem& a, const T* from, int64_t from_step, int64_t count, int64_t k0,
                                            int64_t inputs, T* to, int64_t input_step) {
  constexpr int kL = kLanes<T>;
  const LaneChannels<T> lanes(a, k0, inputs);
  from += lanes.first;
  const int present = int(clamp(a.C - lanes.first, 0, kL));
  for (int64_t j = 0; j < inputs; ++j, to += input_step) {
    if (lanes.pieces == 1) {
      for (int64_t i = 0; i < count; ++i) store(to + i * kL, set1(from[i * from_step + j]));
    } else if (lanes.span <= kL) {
      const index_vec<T> pick = index_load<T>(lanes.from) + index_set1<T>(typename index_vec<T>::Int(j));
      if (present == kL) {
        for (int64_t i = 0; i < count; ++i) store(to + i * kL, permute(load(from + i * from_step), pick));
      } else {
        for (int64_t i = 0; i < count; ++i) store(to + i * kL, permute(load(from + i * from_step, present), pick));
      }
    } else {
      for (int64_t i = 0; i < count; ++i) {
        const T* x = from + i * from_step + j;
        vec<T> value = set1(x[0]);
        for (int piece = 1; piece < lanes.pieces; ++piece) {
          const int begin = lanes.begin[piece];
          value = blend(first_lanes<T>(begin), value, set1(x[lanes.from[begin]]));
        }
        store(to + i * kL, value);
      }
    }
  }
}

// The columns begin..end-1 of a residue that lie inside x.
template <class T>
FC_INLINE Range columns_inside(const Conv2dProblem& a, const ChannelBlocks<T>& blocks, int64_t w) {
  const int64_t begin = clamp(ceil_div(-w, blocks.dilation), 0, blocks.columns);
  return {begin, clamp(ceil_div(a.W - w, blocks.dilation), begin, blocks.columns)};
}

// Writes the padding of the block of columns that starts at w0, and all lanes of the last vector, to every line of the ring: it
// is the same for all rows.
template <class T>
FC_INLINE void pad_lines(const Conv2dProblem& a, const ChannelBlocks<T>& blocks, LineRing<T>& ring, int64_t vectors, int64_t w0) {
  constexpr int kL = kLanes<T>;
  ring.for_each_slot([&](T* line) __attribute__((always_inline)) {
    for (int64_t residue = 0; residue < blocks.dilation; ++residue, line += blocks.columns * kL) {
      const Range inside = columns_inside(a, blocks, w0 + residue);
      for (int64_t v = 0; v < vectors * blocks.inputs; ++v) {
        T* const to = line + v * blocks.input_size();
        for (int64_t j = 0; j < inside.begin * kL; ++j) to[j] = T(0);
        for (int64_t j = inside.end * kL; j < blocks.columns * kL; ++j) to[j] = T(0);
      }
    }
  });
}

// Copies a row of x from column w0 on (which may be negative: padding), filters k0.. of `vectors` vectors.
template <class T>
FC_INLINE void copy_channels(const Conv2dProblem& a, const ChannelBlocks<T>& blocks, const T* x_row, int64_t k0, int64_t vectors,
                             int64_t w0, T* line) {
  constexpr int kL = kLanes<T>;
  const int64_t columns = blocks.columns, dilation = blocks.dilation, inputs = blocks.inputs, input_step = blocks.input_size();
  for (int64_t residue = 0; residue < dilation; ++residue, line += columns * kL) {
    const int64_t w = w0 + residue;
    const Range inside = columns_inside(a, blocks, w);
    const int64_t count = inside.end - inside.begin;
    if (count == 0) continue;
    const T* from = x_row + (w + inside.begin * dilation) * a.x.w;
    T* to = line + inside.begin * kL;
    if (inputs == 1 && a.C == a.K) {
      copy_depthwise(a, from, dilation * a.x.w, count, k0, vectors, to, input_step);
      continue;
    }
    for (int64_t v = 0; v < vectors; ++v) {
      copy_grouped(a, from, dilation * a.x.w, count, k0 + v * kL, inputs, to + v * inputs * input_step, input_step);
    }
  }
}

}  // namespace fastconv::FASTCONV_TARGET

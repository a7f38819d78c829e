// Depthwise and grouped weight gradient with vectors over channels (NHWC).
#include "cpu/blocks/channel_lines.h"
#include "cpu/blocks/depthwise_wgrad.h"
#include "cpu/blocks/parallel.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- tile: one vector of filters and one of its inputs (channel_lines.h), the sums of a tile of taps in registers (TapTile), and
// one row of y going by: for nine FMAs one load of y and nine of x, all aligned and from L1.
//
// Sums have three levels, so that the error grows with the row, the height and the batch, and not with their product: registers
// for one row, then all rows of a sample, then all samples of the piece.

// One row of y for one vector of filters.
template <class T>
struct RowProduct {
  const T* const* lines;  // of x, [filter row * dilation_h]
  int64_t line_offset, input_size, inputs;
  int64_t R, S, stride, dilation_h, dilation_w;
  int64_t r_begin, r_end;  // filter rows that meet the input
  const T* y;
  int64_t y_step, pixels;
  int lanes;
  bool bias;
  const typename index_vec<T>::Int* pick;  // [input][lane], where the inputs are permuted
  T* sums;                                 // [input][R][S][lane], then [lane] of the bias
};

// --- transform: only the copied lines.

// --- multiply
template <class T, LaneInput kInput, int kRows, int kColumns, bool kFull>
FC_INLINE void multiply_taps(const RowProduct<T>& a, int64_t input, int64_t r0, int64_t s0) {
  constexpr int kL = kLanes<T>;
  vec<T> sum[kRows][kColumns];
  const T* x[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    x[r] = a.lines[(r0 + r) * a.dilation_h] + a.line_offset + input * a.input_size + s0 * a.dilation_w * kL;
#pragma GCC unroll 8
    for (int s = 0; s < kColumns; ++s) sum[r][s] = zero<T>();
  }
  index_vec<T> pick = index_vec<T>{};
  if constexpr (kInput == LaneInput::permuted) pick = index_load<T>(a.pick + input * kL);
  const auto load_x = [&](const T* from) __attribute__((always_inline)) {
    if constexpr (kInput == LaneInput::permuted) return permute(load(from), pick);
    if constexpr (kInput == LaneInput::broadcast) return set1(*from);
    return load(from);
  };
  const T* y = a.y;
  const int64_t tap_step = a.dilation_w * kL, pixel_step = a.stride * kL;
  int64_t q = 0;
  if constexpr (kRows == 3 && kColumns == 3 && kVectorRegisters == 32) {
    // A column of x serves three pixels from registers: 4 loads, and 3 permutations, for nine FMAs instead of 10 and 9.
    if (a.stride == 1 && a.dilation_w == 1) {
      vec<T> window[3][3];
#pragma GCC unroll 3
      for (int r = 0; r < 3; ++r) window[r][0] = load_x(x[r]), window[r][1] = load_x(x[r] + kL);
      for (; q + 3 <= a.pixels; q += 3) {
#pragma GCC unroll 3
        for (int i = 0; i < 3; ++i) {
          const vec<T> dy = kFull ? load(y) : load(y, a.lanes);
#pragma GCC unroll 3
          for (int r = 0; r < 3; ++r) {
            window[r][(i + 2) % 3] = load_x(x[r] + (i + 2) * kL);
#pragma GCC unroll 3
            for (int s = 0; s < 3; ++s) sum[r][s] = fma(dy, window[r][(i + s) % 3], sum[r][s]);
          }
          y += a.y_step;
        }
#pragma GCC unroll 3
        for (int r = 0; r < 3; ++r) x[r] += 3 * kL;
      }
    }
  }
  for (; q < a.pixels; ++q) {
    const vec<T> dy = kFull ? load(y) : load(y, a.lanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int s = 0; s < kColumns; ++s) sum[r][s] = fma(dy, load_x(x[r] + s * tap_step), sum[r][s]);
      x[r] += pixel_step;
    }
    y += a.y_step;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int s = 0; s < kColumns; ++s) {
      T* to = a.sums + ((input * a.R + r0 + r) * a.S + s0 + s) * kL;
      store(to, load(to) + sum[r][s]);
    }
  }
}

template <class T, int kS, LaneInput kInput>
void multiply_row(const RowProduct<T>& a) {
  constexpr int kL = kLanes<T>;
  for (int64_t input = 0; input < a.inputs; ++input) {
    for_each_tap_tile<kS>(a.r_begin, a.r_end, a.S, [&]<int kRows, int kColumns>(int64_t r, int64_t s) {
      if (a.lanes == kL) {
        multiply_taps<T, kInput, kRows, kColumns, true>(a, input, r, s);
      } else {
        multiply_taps<T, kInput, kRows, kColumns, false>(a, input, r, s);
      }
    });
  }
  if (a.bias) {
    vec<T> sum = zero<T>();
    for (int64_t q = 0; q < a.pixels; ++q) sum = sum + load(a.y + q * a.y_step, a.lanes);
    T* to = a.sums + a.inputs * a.R * a.S * kL;
    store(to, load(to) + sum);
  }
}

template <class T>
using RowFunction = void (*)(const RowProduct<T>&);

template <class T>
RowFunction<T> choose_row(const Conv2dProblem& a) {
  RowFunction<T> multiply = nullptr;
  with_tap_tile(a.S, [&]<int kS>() { multiply = multiply_row<T, kS, LaneInput::copied>; });
  if (a.S != 3) return multiply;
  const LaneInput input = lane_input<T>(a);
  return input == LaneInput::permuted    ? multiply_row<T, 3, LaneInput::permuted>
         : input == LaneInput::broadcast ? multiply_row<T, 3, LaneInput::broadcast>
                                         : multiply;
}

// What one thread works in.
template <class T>
struct Scratch {
  T* sample_sums;  // [vector of the block][input*R*S + 1][lane]
  T* piece_sums;   // the same
  typename index_vec<T>::Int* pick;
  LineRing<T> ring;

  FC_INLINE Scratch(const Conv2dProblem& a, const ChannelBlocks<T>& blocks, Arena& arena)
      : sample_sums(arena.take<T>(blocks.of_vectors.largest() * (a.C / a.groups * a.R * a.S + 1) * kLanes<T>)),
        piece_sums(arena.take<T>(blocks.of_vectors.largest() * (a.C / a.groups * a.R * a.S + 1) * kLanes<T>)),
        pick(arena.take<typename index_vec<T>::Int>(a.C / a.groups * kLanes<T>)),
        ring(blocks.window, blocks.line_size(), arena) {}
};

template <class T>
struct Layout {
  LaneInput input;
  int64_t inputs;  // of a filter
  ChannelBlocks<T> blocks;
  EvenSplit pieces;    // of the N*P rows of y
  int64_t sums;        // elements of the sums of one vector: its inputs' R*S taps and the bias
  int64_t per_thread;  // bytes
  int64_t partial;     // elements of the sums of one piece; they come before the
                       // threads' scratch

  FC_INLINE explicit Layout(const Conv2dProblem& a)
      : input(a.S == 3 ? lane_input<T>(a) : LaneInput::copied),
        inputs(a.C / a.groups),
        blocks(a, 1, 1, 1, input),
        pieces(row_pieces(a.N * a.P, 1, blocks.of_vectors.parts)),
        sums((inputs * a.R * a.S + 1) * kLanes<T>) {
    Arena arena(nullptr);
    Scratch<T>(a, blocks, arena);
    per_thread = arena.used();
    partial = blocks.vectors * sums;
  }
  FC_INLINE int64_t partial_bytes() const { return round_up(pieces.parts * partial * int64_t(sizeof(T)), 64); }
};

// Sums rows begin..end of the N*P rows of y for one block of channels into scratch.piece_sums.
template <class T>
void sum_piece(const Conv2dProblem& a, const Conv2dArgs& args, const Layout<T>& layout, Scratch<T>& scratch,
               RowFunction<T> multiply, int64_t block, int64_t begin, int64_t end) {
  constexpr int kL = kLanes<T>;
  const ChannelBlocks<T>& blocks = layout.blocks;
  const int64_t v0 = blocks.of_vectors.begin(block), vectors = blocks.of_vectors.size(block);
  for (int64_t i = 0; i < vectors * layout.sums; ++i) scratch.sample_sums[i] = scratch.piece_sums[i] = T(0);
  for (int64_t first = begin; first < end;) {
    const int64_t n = first / a.P, p_begin = first - n * a.P;
    const int64_t p_end = end - n * a.P < a.P ? end - n * a.P : a.P;
    for (int64_t q0 = 0; q0 < a.Q; q0 += blocks.q_size) {
      scratch.ring.clear();
      pad_lines(a, blocks, scratch.ring, vectors, q0 * a.stride_w - a.pad_left);
      for (int64_t p = p_begin; p < p_end; ++p) {
        scratch.ring.fetch_tile(a, p, 1, [&](const int64_t* h, T* const* to, int64_t count) {
          const T* x = static_cast<const T*>(args.x) + n * a.x.n;
          for (int64_t i = 0; i < count; ++i) {
            copy_channels(a, blocks, x + h[i] * a.x.h, v0 * kL, vectors, q0 * a.stride_w - a.pad_left, to[i]);
          }
        });
        const Range taps = taps_inside(a.R, a.dilation_h, p * a.stride_h - a.pad_top, a.H);
        RowProduct<T> row;
        row.lines = scratch.ring.lines;
        row.inputs = layout.inputs, row.pick = scratch.pick;
        row.input_size = layout.input == LaneInput::copied ? blocks.input_size() : layout.input == LaneInput::broadcast ? 1 : 0;
        row.R = a.R, row.S = a.S, row.stride = a.stride_w, row.dilation_h = a.dilation_h, row.dilation_w = a.dilation_w;
        row.r_begin = taps.begin, row.r_end = taps.end;
        row.y_step = a.y.w;
        row.pixels = a.Q - q0 < blocks.q_size ? a.Q - q0 : blocks.q_size;
        row.bias = a.epilogue.bias;
        for (int64_t v = 0; v < vectors; ++v) {
          const int64_t k = (v0 + v) * kL;
          row.line_offset = v * blocks.inputs * blocks.input_size();
          row.y = static_cast<const T*>(args.y) + n * a.y.n + p * a.y.h + q0 * a.y.w + k;
          row.lanes = a.K - k < kL ? int(a.K - k) : kL;
          row.sums = scratch.sample_sums + v * layout.sums;
          multiply(row);
        }
      }
    }
    move_sums(scratch.sample_sums, scratch.piece_sums, vectors * layout.sums);
    first = n * a.P + p_end;
  }
}

}  // namespace

// --- run: one task is one block of channels and one piece of the rows.
template <class T>
void depthwise_wgrad_channels_run(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context) {
  if (depthwise_wgrad_in_place<T>(a)) return depthwise_wgrad_pixels_run<T>(a, args, context);
  const Layout<T> layout(a);
  const ChannelBlocks<T>& blocks = layout.blocks;
  const RowFunction<T> multiply = choose_row<T>(a);
  const int64_t pieces = layout.pieces.parts;
  T* partials = static_cast<T*>(context.workspace);
  parallel_ranges(context, blocks.of_vectors.parts * pieces, [&](int thread, int64_t begin, int64_t end) {
    Arena arena(static_cast<char*>(context.workspace) + layout.partial_bytes() + thread * layout.per_thread);
    Scratch<T> scratch(a, blocks, arena);
    scratch.ring.fill_zeros();
    if (layout.input == LaneInput::permuted) fill_pick<T>(layout.inputs, layout.inputs, scratch.pick);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task / pieces, piece = task % pieces, v0 = blocks.of_vectors.begin(block);
      const int64_t first = layout.pieces.begin(piece);
      sum_piece(a, args, layout, scratch, multiply, block, first, first + layout.pieces.size(piece));
      for (int64_t v = 0; v < blocks.of_vectors.size(block); ++v) {
        T* sums = scratch.piece_sums + v * layout.sums;
        if (pieces == 1) {
          write_channel_gradient(a, args, v0 + v, sums);
        } else {
          T* to = partials + piece * layout.partial + (v0 + v) * layout.sums;
          for (int64_t i = 0; i < layout.sums; i += kLanes<T>) store(to + i, load(sums + i));
        }
      }
    }
  });
  if (pieces == 1) return;
  parallel_ranges(context, blocks.vectors, [&](int, int64_t begin, int64_t end) {
    for (int64_t v = begin; v < end; ++v) {
      T* sums = partials + v * layout.sums;
      for (int64_t piece = 1; piece < pieces; ++piece)
        move_sums(partials + piece * layout.partial + v * layout.sums, sums, layout.sums);
      write_channel_gradient(a, args, v, sums);
    }
  });
}

template <class T>
int64_t depthwise_wgrad_channels_workspace(const Conv2dProblem& a, const Machine& machine) {
  if (depthwise_wgrad_in_place<T>(a)) return depthwise_wgrad_pixels_workspace<T>(a, machine);
  const Layout<T> layout(a);
  return layout.partial_bytes() + machine.threads * layout.per_thread;
}

template void depthwise_wgrad_channels_run<float>(const Conv2dProblem&, const Conv2dArgs&, const Context&);
template void depthwise_wgrad_channels_run<double>(const Conv2dProblem&, const Conv2dArgs&, const Context&);
template int64_t depthwise_wgrad_channels_workspace<float>(const Conv2dProblem&, const Machine&);
template int64_t depthwise_wgrad_channels_workspace<double>(const Conv2dProblem&, const Machine&);

}  // namespace fastconv::FASTCONV_TARGET

// Depthwise and grouped forward with vectors over channels (NHWC).
#include "cpu/blocks/activation.h"
#include "cpu/blocks/channel_lines.h"
#include "cpu/blocks/channel_weights.h"
#include "cpu/blocks/depthwise.h"
#include "cpu/blocks/parallel.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- tile: one vector of filters x 7, 8 or 14 pixels of one output row.
//
// 14 sums + S weights of one filter row + 1 input are 18, 20 and 22 of AVX-512's registers for S = 3, 5, 7; 8 sums and 3 or 5
// weights fit the 16 of the others. With stride 1 a row of the filter takes pixels + S - 1 inputs and S weights from L1 for
// pixels * S FMAs: 19 loads for 42 with S = 3. A sum's FMAs of one row follow each other at once, and two ports of latency 4 want
// eight chains: with 14 they need no help from the next row. Seven and fourteen because 7, 14, 28, 56 and 112 are what networks
// have; eight for the powers of two. Of those that compute the fewest pixels too many the widest.
FC_INLINE int64_t pixels_of(int64_t columns) {
  const int64_t by_7 = round_up(columns, 7), by_8 = round_up(columns, 8), by_14 = round_up(columns, 14);
  if (kVectorRegisters == 32 && by_14 <= by_7 && by_14 <= by_8) return 14;
  return by_7 <= by_8 ? 7 : 8;
}

// The columns of a dilated row are taken apart into dense rows, where those fill their tiles at least to two thirds.
FC_INLINE int64_t apart(const Conv2dProblem& a) {
  if (a.dilation_w == 1 || a.stride_w != 1 || a.S == 1) return 1;
  const int64_t columns = (a.Q + a.dilation_w - 1) / a.dilation_w;
  return 2 * round_up(columns, pixels_of(columns)) * a.dilation_w <= 3 * a.Q ? a.dilation_w : 1;
}

// One vector of filters of one output row, in one block of columns.
template <class T>
struct PixelRow {
  const T* const* lines;                   // of the filter rows that meet the input, in order, each as often as there are inputs
  int64_t rows;                            // how many
  const typename index_vec<T>::Int* pick;  // [row][lane], where the inputs are permuted
  int64_t line_offset;                     // of this vector of filters
  const T* w;                              // [row][S][lane]
  int64_t S, stride, dilation;
  int64_t pixels;
  int lanes;  // of the vector that exist
  T* y;
  const T* residual;  // or nullptr
  int64_t y_step;
  const T* bias;  // [lane]
  T* sums;        // [pixel][lane], scratch
  Activation activation;
};

// --- transform: channel_lines.h and channel_weights.h.

// --- multiply. kInput says how a lane gets its input, see channel_lines.h. kR is 0 where the number of rows is only known at run
// time, kS and kStride likewise.
template <class T, int kPixels, int kS, int kStride, LaneInput kInput = LaneInput::copied>
FC_INLINE void multiply_taps(const T* line, const vec<T>* weight, vec<T> (&sum)[kPixels], index_vec<T> pick = index_vec<T>{}) {
#pragma GCC unroll 64
  for (int column = 0; column < (kPixels - 1) * kStride + kS; ++column) {
    // GCC would make the load an operand of each of its FMAs: 63 loads for 63 FMAs of a 3x3 tile instead of 27, and 5 % slower.
    vec<T> x = kInput == LaneInput::broadcast ? set1(line[column * kLanes<T>]) : load(line + column * kLanes<T>);
    if constexpr (kInput == LaneInput::permuted) x = permute(x, pick);
#ifdef __x86_64__
    asm("" : "+v"(x.v));
#endif
#pragma GCC unroll 16
    for (int i = 0; i < kPixels; ++i) {
      const int s = column - i * kStride;
      if (s >= 0 && s < kS) sum[i] = fma(x, weight[s], sum[i]);
    }
  }
}

// sum + residual, activated and stored: `count` pixels of `lanes` lanes. Kept out of the tile, because it is for tails, residuals
// and the activations that need an exponential; inlined, their code would be most of the tile's.
template <class T>
__attribute__((noinline)) void finish_slowly(const PixelRow<T>& a, const vec<T>* sum, int64_t q, int count) {
  for (int i = 0; i < count; ++i) {
    const int64_t offset = (q + i) * a.y_step;
    const vec<T> value = a.residual ? sum[i] + load(a.residual + offset, a.lanes) : sum[i];
    store(a.y + offset, activate(a.activation, value), a.lanes);
  }
}

template <class T, int kPixels>
FC_INLINE void finish_tile(const PixelRow<T>& a, Activation activation, vec<T> (&sum)[kPixels], int64_t q, int64_t y_step) {
  if (a.pixels - q < kPixels || a.residual || a.lanes < kLanes<T> || activation > Activation::relu6) {
    vec<T> copy[kPixels];
#pragma GCC unroll 16
    for (int i = 0; i < kPixels; ++i) copy[i] = sum[i];
    return finish_slowly(a, copy, q, a.pixels - q < kPixels ? int(a.pixels - q) : kPixels);
  }
  if (activation == Activation::relu) {
#pragma GCC unroll 16
    for (int i = 0; i < kPixels; ++i) sum[i] = activate(Activation::relu, sum[i]);
  } else if (activation == Activation::relu6) {
#pragma GCC unroll 16
    for (int i = 0; i < kPixels; ++i) sum[i] = activate(Activation::relu6, sum[i]);
  }
  T* y = a.y + q * y_step;
#pragma GCC unroll 16
  for (int i = 0; i < kPixels; ++i) store(y + i * y_step, sum[i]);
}

// Filters of at most seven columns: all rows of the filter for one tile, then the next tile.
template <class T, int kPixels, int kR, int kS, int kStride, LaneInput kInput = LaneInput::copied>
void multiply_row(const PixelRow<T>& a) {
  constexpr int kL = kLanes<T>;
  // All weights stay in registers where there is room: 9 + 14 sums + 1 input. With S of them at a time the loads and the loop
  // made a 3x3 tile 1.7 times slower.
  constexpr bool kResident = kR > 0 && kR * kS + kPixels + 4 <= kVectorRegisters;
  vec<T> resident[kResident ? kR * kS : 1];
  if constexpr (kResident) {
#pragma GCC unroll 32
    for (int t = 0; t < kR * kS; ++t) resident[t] = load(a.w + t * kL);
  }
  const vec<T> bias = load(a.bias);
  // Everything that the loop needs is copied: the compiler must assume that a store to y changes the fields.
  const T* const* lines = a.lines;
  const int64_t line_offset = a.line_offset, rows = a.rows, y_step = a.y_step, pixels = a.pixels;
  const Activation activation = a.activation;
  for (int64_t q = 0; q < pixels; q += kPixels) {
    vec<T> sum[kPixels];
#pragma GCC unroll 16
    for (int i = 0; i < kPixels; ++i) sum[i] = bias;
    const T* w = a.w;
    if constexpr (kR > 0) {
#pragma GCC unroll 8
      for (int r = 0; r < kR; ++r) {
        const T* line = lines[r] + line_offset + q * kStride * kL;
        if constexpr (kResident) {
          multiply_taps<T, kPixels, kS, kStride>(line, resident + r * kS, sum);
        } else {
          vec<T> weight[kS];
#pragma GCC unroll 8
          for (int s = 0; s < kS; ++s) weight[s] = load(w + (r * kS + s) * kL);
          multiply_taps<T, kPixels, kS, kStride>(line, weight, sum);
        }
      }
    } else if constexpr (kS > 0) {
      for (int64_t r = 0; r < rows; ++r) {
        vec<T> weight[kS];
#pragma GCC unroll 8
        for (int s = 0; s < kS; ++s) weight[s] = load(w + s * kL);
        index_vec<T> pick{};
        if constexpr (kInput == LaneInput::permuted) pick = index_load<T>(a.pick + r * kL);
        multiply_taps<T, kPixels, kS, kStride, kInput>(lines[r] + line_offset + q * kStride * kL, weight, sum, pick);
        w += kS * kL;
      }
    } else {
      const int64_t stride = a.stride, dilation = a.dilation, S = a.S;
      for (int64_t r = 0; r < rows; ++r) {
        const T* line = lines[r] + line_offset + q * stride * kL;
        for (int64_t s = 0; s < S; ++s) {
          const vec<T> weight = load(w);
#pragma GCC unroll 16
          for (int i = 0; i < kPixels; ++i) sum[i] = fma(load(line + (i * stride + s * dilation) * kL), weight, sum[i]);
          w += kL;
        }
      }
    }
    finish_tile(a, activation, sum, q, y_step);
  }
}

// kS taps of a row, whose weights are in registers.
template <class T, int kPixels, int kS, int kStride>
FC_INLINE void multiply_block(const T*& line, const T*& w, vec<T> (&sum)[kPixels]) {
  constexpr int kL = kLanes<T>;
  vec<T> weight[kS];
#pragma GCC unroll 8
  for (int s = 0; s < kS; ++s) weight[s] = load(w + s * kL);
  multiply_taps<T, kPixels, kS, kStride>(line, weight, sum);
  line += kS * kL, w += kS * kL;
}

// Any other number of columns: one row of the filter for all tiles, then the next. Its weights and its line of x stay in L1 that
// way, 2 + 5.5 KB for 31 taps and 56 pixels, where all weights are 61 KB and the lines that a tile reads 85; the sums wait in L1,
// which costs two accesses for every S FMAs.
template <class T, int kPixels, int kStride>
void multiply_wide(const PixelRow<T>& a) {
  constexpr int kL = kLanes<T>, kBlock = kVectorRegisters == 32 ? 8 : 4;
  const vec<T> bias = load(a.bias);
  const int64_t rows = a.rows, pixels = a.pixels, S = a.S;
  T* const sums = a.sums;
  for (int64_t r = 0; r < rows || r == 0; ++r) {
    for (int64_t q = 0; q < pixels; q += kPixels) {
      vec<T> sum[kPixels];
      T* const kept = sums + q * kL;
#pragma GCC unroll 16
      for (int i = 0; i < kPixels; ++i) sum[i] = r == 0 ? bias : load(kept + i * kL);
      if (rows > 0) {
        const T* line = a.lines[r] + a.line_offset + q * kStride * kL;
        const T* w = a.w + r * S * kL;
        int64_t s = S;
        for (; s >= kBlock; s -= kBlock) multiply_block<T, kPixels, kBlock, kStride>(line, w, sum);
        if (kBlock > 4 && s >= 4) multiply_block<T, kPixels, 4, kStride>(line, w, sum), s -= 4;
        if (s >= 2) multiply_block<T, kPixels, 2, kStride>(line, w, sum), s -= 2;
        if (s == 1) multiply_block<T, kPixels, 1, kStride>(line, w, sum);
      }
      if (r + 1 < rows) {
#pragma GCC unroll 16
        for (int i = 0; i < kPixels; ++i) store(kept + i * kL, sum[i]);
      } else {
        finish_tile(a, a.activation, sum, q, a.y_step);
      }
    }
  }
}

template <class T>
using RowFunction = void (*)(const PixelRow<T>&);

// Whether the inputs of groups come from registers: filters of the sizes that networks group.
template <class T>
FC_INLINE LaneInput input_of(const Conv2dProblem& a, int64_t dilation) {
  const bool tile = (a.dilation_w == dilation || a.S == 1) && ((a.stride_w == 1 && a.S <= 3) || (a.stride_w == 2 && a.S == 3));
  return tile ? lane_input<T>(a) : LaneInput::copied;
}

template <class T, int kPixels, LaneInput kInput>
RowFunction<T> choose_grouped_row(const Conv2dProblem& a) {
  if (a.stride_w == 2) return multiply_row<T, kPixels, 0, 3, 2, kInput>;
  if (a.S == 1) return multiply_row<T, kPixels, 0, 1, 1, kInput>;
  return a.S == 2 ? multiply_row<T, kPixels, 0, 2, 1, kInput> : multiply_row<T, kPixels, 0, 3, 1, kInput>;
}

// For rows whose filter lies inside the input from top to bottom (`whole`), and for the others.
template <class T, int kPixels>
RowFunction<T> choose_row(const Conv2dProblem& a, int64_t dilation, bool whole) {
  const bool dense = a.dilation_w == dilation || a.S == 1;
  const LaneInput input = input_of<T>(a, dilation);
  if (input == LaneInput::permuted) return choose_grouped_row<T, kPixels, LaneInput::permuted>(a);
  if (input == LaneInput::broadcast) return choose_grouped_row<T, kPixels, LaneInput::broadcast>(a);
  if (dense && a.stride_w == 1) {
    if (whole && a.R == 3 && a.S == 3 && a.C == a.groups) return multiply_row<T, kPixels, 3, 3, 1>;
    switch (a.S) {
      case 1:
        return multiply_row<T, kPixels, 0, 1, 1>;
      case 2:
        return multiply_row<T, kPixels, 0, 2, 1>;
      case 3:
        return multiply_row<T, kPixels, 0, 3, 1>;
      case 5:
        return multiply_row<T, kPixels, 0, 5, 1>;
      case 7:
        return multiply_row<T, kPixels, 0, 7, 1>;
    }
    return multiply_wide<T, kPixels, 1>;
  }
  if (dense && a.stride_w == 2) {
    if (whole && a.R == 3 && a.S == 3 && a.C == a.groups) return multiply_row<T, kPixels, 3, 3, 2>;
    switch (a.S) {
      case 3:
        return multiply_row<T, kPixels, 0, 3, 2>;
      case 5:
        return multiply_row<T, kPixels, 0, 5, 2>;
      case 7:
        return multiply_row<T, kPixels, 0, 7, 2>;
    }
    return multiply_wide<T, kPixels, 2>;
  }
  return multiply_row<T, kPixels, 0, 0, 0>;
}

template <class T>
RowFunction<T> choose_row(const Conv2dProblem& a, int64_t pixels, int64_t dilation, bool whole) {
  if constexpr (kVectorRegisters == 32) {
    if (pixels == 14) return choose_row<T, 14>(a, dilation, whole);
  }
  return pixels == 7 ? choose_row<T, 7>(a, dilation, whole) : choose_row<T, 8>(a, dilation, whole);
}

// Rows of y that one vector of filters makes before the next, at most. Its lines come from L2 once for all of them.
constexpr int64_t kMostRows = 4;

// The tile and the blocks of a problem.
template <class T>
struct Layout {
  int64_t dilation, pixels;
  LaneInput input;
  int64_t inputs;  // of a filter
  ChannelBlocks<T> blocks;

  FC_INLINE explicit Layout(const Conv2dProblem& a)
      : dilation(apart(a)),
        pixels(pixels_of(ceil_div(a.Q, dilation))),
        input(input_of<T>(a, dilation)),
        inputs(a.C == a.groups ? 1 : a.C / a.groups),
        blocks(a, pixels, dilation, kMostRows, input) {}
};

// What one thread works in.
template <class T>
struct Scratch {
  T* weights;                        // [vector][R][input][S][lane]
  T* bias;                           // [vector][lane]
  T* sums;                           // [pixel][lane]
  const T** rows;                    // [row of the tile][R][input]: where it is in the ring
  typename index_vec<T>::Int* pick;  // [R][input][lane]
  int8_t* packed;                    // [block of channels]: its weights and bias are there
  LineRing<T> ring;

  FC_INLINE Scratch(const Conv2dProblem& a, const Layout<T>& layout, Arena& arena)
      : weights(arena.take<T>(layout.blocks.vectors * a.R * a.S * layout.inputs * kLanes<T>)),
        bias(arena.take<T>(layout.blocks.vectors * kLanes<T>)),
        sums(arena.take<T>(layout.blocks.q_size * kLanes<T>)),
        rows(arena.take<const T*>(layout.blocks.tile_rows * a.R * layout.inputs)),
        pick(arena.take<typename index_vec<T>::Int>(layout.input == LaneInput::permuted ? a.R * layout.inputs * kLanes<T> : 0)),
        packed(arena.take<int8_t>(layout.blocks.of_vectors.parts)),
        ring(layout.blocks.window, layout.blocks.line_size(), arena) {}
};

template <class T>
int64_t scratch_bytes(const Conv2dProblem& a, const Layout<T>& layout) {
  Arena arena(nullptr);
  Scratch<T>(a, layout, arena);
  return arena.used();
}

// One output row of one vector of filters, whose columns may be taken apart.
template <class T>
__attribute__((noinline)) void multiply_apart(const PixelRow<T>& whole, RowFunction<T> multiply, int64_t dilation,
                                              int64_t line_step) {
  PixelRow<T> row = whole;
  const int64_t pixels = row.pixels, y_step = row.y_step;
  row.y_step *= dilation;
  for (int64_t residue = 0; residue < dilation && residue < pixels; ++residue) {
    row.pixels = (pixels - residue + dilation - 1) / dilation;
    multiply(row);
    row.line_offset += line_step;
    row.y += y_step;
    if (row.residual) row.residual += y_step;
  }
}

}  // namespace

// --- run: one task is the rows of a tile of one sample, block of channels and block of columns. Rows come last in the order, so
// that a thread walks down the ring.
template <class T>
void depthwise_channels_run(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context) {
  if (depthwise_in_place<T>(a)) return depthwise_pixels_run<T>(a, args, context);
  constexpr int kL = kLanes<T>;
  const Layout<T> layout(a);
  const ChannelBlocks<T>& blocks = layout.blocks;
  const RowFunction<T> multiply_whole = choose_row<T>(a, layout.pixels, layout.dilation, true);
  const RowFunction<T> multiply_clipped = choose_row<T>(a, layout.pixels, layout.dilation, false);
  const int64_t per_thread = scratch_bytes<T>(a, layout), inputs = layout.inputs, filter_size = a.R * a.S * inputs * kL;
  const int64_t dilation = layout.dilation, tile_rows = blocks.tile_rows, tiles = (a.P + tile_rows - 1) / tile_rows;
  // From one input of a line to the next.
  const int64_t input_step = layout.input == LaneInput::copied      ? blocks.input_size()
                             : layout.input == LaneInput::broadcast ? 1
                                                                    : 0;
  parallel_ranges(context, a.N * blocks.q_blocks * blocks.of_vectors.parts * tiles, [&](int thread, int64_t begin, int64_t end) {
    Arena arena(static_cast<char*>(context.workspace) + thread * per_thread);
    Scratch<T> scratch(a, layout, arena);
    if (layout.input == LaneInput::permuted) fill_pick<T>(a.R * inputs, inputs, scratch.pick);
    scratch.ring.fill_zeros();
    for (int64_t i = 0; i < blocks.of_vectors.parts; ++i) scratch.packed[i] = 0;
    int64_t unit = begin / tiles - 1, tile = tiles, n = 0, q0 = 0, v0 = 0, vectors = 0;
    for (int64_t task = begin; task < end; ++task, ++tile) {
      if (tile == tiles) {
        tile = task == begin ? begin % tiles : 0;
        ++unit;
        const int64_t block = unit % blocks.of_vectors.parts;
        q0 = unit / blocks.of_vectors.parts % blocks.q_blocks * blocks.q_size;
        n = unit / blocks.of_vectors.parts / blocks.q_blocks;
        v0 = blocks.of_vectors.begin(block), vectors = blocks.of_vectors.size(block);
        scratch.ring.clear();
        pad_lines(a, blocks, scratch.ring, vectors, q0 * a.stride_w - a.pad_left);
        if (!scratch.packed[block]) {
          pack_channel_weights(a, static_cast<const T*>(args.w), v0 * kL, vectors, scratch.weights + v0 * filter_size);
          for (int64_t k = v0 * kL; k < (v0 + vectors) * kL; ++k) {
            scratch.bias[k] = a.epilogue.bias && k < a.K ? static_cast<const T*>(args.bias)[k] : T(0);
          }
          scratch.packed[block] = 1;
        }
      }
      const int64_t p0 = tile * tile_rows, rows = a.P - p0 < tile_rows ? a.P - p0 : tile_rows;
      scratch.ring.fetch_tile(a, p0, rows, [&](const int64_t* h, T* const* to, int64_t count) {
        const T* x = static_cast<const T*>(args.x) + n * a.x.n;
        const int64_t w0 = q0 * a.stride_w - a.pad_left;
        for (int64_t i = 0; i < count; ++i) copy_channels(a, blocks, x + h[i] * a.x.h, v0 * kL, vectors, w0, to[i]);
      });
      PixelRow<T> row;
      row.sums = scratch.sums, row.pick = scratch.pick;
      row.S = a.S, row.stride = a.stride_w, row.dilation = a.dilation_w;
      row.pixels = a.Q - q0 < blocks.q_size ? a.Q - q0 : blocks.q_size;
      row.y_step = a.y.w;
      row.activation = a.epilogue.activation;
      Range taps[kMostRows];
      for (int64_t b = 0; b < rows; ++b) {
        taps[b] = taps_inside(a.R, a.dilation_h, (p0 + b) * a.stride_h - a.pad_top, a.H);
        const T** to = scratch.rows + b * a.R * inputs;
        for (int64_t r = taps[b].begin; r < taps[b].end; ++r) {
          const T* line = scratch.ring.lines[b * a.stride_h + r * a.dilation_h];
          for (int64_t j = 0; j < inputs; ++j, line += input_step) *to++ = line;
        }
      }
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t k = (v0 + v) * kL, y_offset = n * a.y.n + p0 * a.y.h + q0 * a.y.w + k;
        row.line_offset = v * blocks.inputs * blocks.input_size();
        row.lanes = a.K - k < kL ? int(a.K - k) : kL;
        row.bias = scratch.bias + k;
        for (int64_t b = 0; b < rows; ++b) {
          const int64_t clipped = taps[b].end > taps[b].begin ? taps[b].end - taps[b].begin : 0;
          row.lines = scratch.rows + b * a.R * inputs, row.rows = clipped * inputs;
          row.w = scratch.weights + (v0 + v) * filter_size + taps[b].begin * inputs * a.S * kL;
          row.y = static_cast<T*>(args.y) + y_offset + b * a.y.h;
          row.residual = a.epilogue.residual ? static_cast<const T*>(args.residual) + y_offset + b * a.y.h : nullptr;
          const RowFunction<T> multiply = clipped == a.R ? multiply_whole : multiply_clipped;
          dilation == 1 ? multiply(row) : multiply_apart(row, multiply, dilation, blocks.columns * kL);
        }
      }
    }
  });
}

template <class T>
int64_t depthwise_channels_workspace(const Conv2dProblem& a, const Machine& machine) {
  if (depthwise_in_place<T>(a)) return depthwise_pixels_workspace<T>(a, machine);
  return machine.threads * scratch_bytes<T>(a, Layout<T>(a));
}

template void depthwise_channels_run<float>(const Conv2dProblem&, const Conv2dArgs&, const Context&);
template void depthwise_channels_run<double>(const Conv2dProblem&, const Conv2dArgs&, const Context&);
template int64_t depthwise_channels_workspace<float>(const Conv2dProblem&, const Machine&);
template int64_t depthwise_channels_workspace<double>(const Conv2dProblem&, const Machine&);

}  // namespace fastconv::FASTCONV_TARGET

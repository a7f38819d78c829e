// Depthwise forward with vectors over channels (NHWC).
#include "cpu/blocks/activation.h"
#include "cpu/blocks/depthwise.h"
#include "cpu/blocks/depthwise_lines.h"
#include "cpu/blocks/parallel.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- tile: one vector of channels x 7 or 8 pixels of one output row.
//
// 8 sums + S weights of one filter row + 1 input are 12, 14 and 16 registers for S = 3, 5, 7: every ISA has them. With stride 1 a
// row of the filter takes pixels + S - 1 inputs and S weights from L1 for pixels * S FMAs: 12 loads for 21 with S = 3. Seven
// pixels because 7, 14, 28, 56 and 112 are what networks have; eight for the powers of two.
constexpr int64_t pixels_of(int64_t columns) { return (columns + 6) / 7 * 7 <= (columns + 7) / 8 * 8 ? 7 : 8; }

// One vector of channels of one output row, in one block of columns.
template <class T>
struct PixelRow {
  const T* const* lines;  // of the filter rows that meet the input, in order
  int64_t line_step;      // between two of them
  int64_t taps;           // how many
  int64_t line_offset;    // of this vector of channels
  const T* w;             // [tap row][S][lane]
  int64_t S, stride, dilation;
  int64_t pixels;
  int lanes;  // of the vector that exist
  T* y;
  const T* residual;  // or nullptr
  int64_t y_step;
  const T* bias;  // [lane]
  Activation activation;
};

// --- transform: packed[vector][r][s][lane] = w[k, 0, r, s], zero where there is no channel.
template <class T>
void pack_weights(const Conv2dProblem& a, int64_t multiplier, const T* w, int64_t k0, int64_t vectors, T* packed) {
  constexpr int kL = kLanes<T>;
  const int64_t taps = a.R * a.S, k_step = multiplier == 1 ? a.w.g : a.w.k;
  // The taps of a filter lie side by side, forwards or (for the input gradient) backwards.
  const int64_t direction = a.S > 1 ? a.w.s : a.R > 1 ? a.w.r : 1;
  const bool dense = (direction == 1 || direction == -1) && (a.S == 1 || a.R == 1 || a.w.r == a.w.s * a.S) &&
                     (multiplier == 1 || a.w.g == a.w.k * multiplier);
  for (int64_t v = 0; v < vectors; ++v) {
    const int64_t k = k0 + v * kL;
    T* to = packed + v * taps * kL;
    if (dense && k + kL <= a.K) {
      const T* from = w + k * k_step;
      for (int64_t t = 0; t < taps; t += kL) {
        const int count = taps - t < kL ? int(taps - t) : kL;
        const T* first = direction == 1 ? from + t : from - (t + count - 1);
        vec<T> rows[kL];
        for (int i = 0; i < kL; ++i) rows[i] = count == kL ? load(first + i * k_step) : load(first + i * k_step, count);
        transpose(rows);
#pragma GCC unroll 16
        for (int i = 0; i < kL; ++i) {
          if (i < count) store(to + (direction == 1 ? t + i : t + count - 1 - i) * kL, rows[i]);
        }
      }
      continue;
    }
    for (int i = 0; i < kL; ++i) {
      const T* from = w + (k + i) / multiplier * a.w.g + (k + i) % multiplier * a.w.k;
      for (int64_t r = 0; r < a.R; ++r) {
        for (int64_t s = 0; s < a.S; ++s) to[(r * a.S + s) * kL + i] = k + i < a.K ? from[r * a.w.r + s * a.w.s] : T(0);
      }
    }
  }
}

// --- multiply. kR is 0 where the number of rows is only known at run time, kS and kStride likewise.
template <class T, int kPixels, int kS, int kStride>
FC_INLINE void multiply_taps(const T* line, const vec<T>* weight, vec<T> (&sum)[kPixels]) {
#pragma GCC unroll 32
  for (int column = 0; column < (kPixels - 1) * kStride + kS; ++column) {
    // GCC would make the load an operand of each of its FMAs: 63 loads for 63 FMAs of a 3x3 tile instead of 27, and 5 % slower.
    vec<T> x = load(line + column * kLanes<T>);
#ifdef __x86_64__
    asm("" : "+v"(x.v));
#endif
#pragma GCC unroll 8
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

template <class T, int kPixels, int kR, int kS, int kStride>
void multiply_row(const PixelRow<T>& a) {
  constexpr int kL = kLanes<T>;
  // All weights stay in registers where there is room: 9 + 8 sums + 1 input. With S of them at a time the loads and the loop made
  // a 3x3 tile 1.7 times slower.
  constexpr bool kResident = kR > 0 && kR * kS + kPixels + 4 <= kVectorRegisters;
  vec<T> resident[kResident ? kR * kS : 1];
  if constexpr (kResident) {
#pragma GCC unroll 32
    for (int t = 0; t < kR * kS; ++t) resident[t] = load(a.w + t * kL);
  }
  const vec<T> bias = load(a.bias);
  // Everything that the loop needs is copied: the compiler must assume that a store to y changes the fields.
  const T* const* lines = a.lines;
  const int64_t line_step = a.line_step, line_offset = a.line_offset, taps = a.taps, y_step = a.y_step, pixels = a.pixels;
  const Activation activation = a.activation;
  const bool slow = a.residual || a.lanes < kL || activation > Activation::relu6;
  T* y = a.y;
  for (int64_t q = 0; q < pixels; q += kPixels, y += kPixels * y_step) {
    vec<T> sum[kPixels];
#pragma GCC unroll 8
    for (int i = 0; i < kPixels; ++i) sum[i] = bias;
    const T* w = a.w;
    if constexpr (kR > 0) {
#pragma GCC unroll 8
      for (int r = 0; r < kR; ++r) {
        const T* line = lines[r * line_step] + line_offset + q * kStride * kL;
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
      for (int64_t r = 0; r < taps; ++r) {
        vec<T> weight[kS];
#pragma GCC unroll 8
        for (int s = 0; s < kS; ++s) weight[s] = load(w + s * kL);
        multiply_taps<T, kPixels, kS, kStride>(lines[r * line_step] + line_offset + q * kStride * kL, weight, sum);
        w += kS * kL;
      }
    } else {
      const int64_t stride = a.stride, dilation = a.dilation, S = a.S;
      for (int64_t r = 0; r < taps; ++r) {
        const T* line = lines[r * line_step] + line_offset + q * stride * kL;
        for (int64_t s = 0; s < S; ++s) {
          const vec<T> weight = load(w);
#pragma GCC unroll 8
          for (int i = 0; i < kPixels; ++i) sum[i] = fma(load(line + (i * stride + s * dilation) * kL), weight, sum[i]);
          w += kL;
        }
      }
    }
    if (slow || pixels - q < kPixels) {
      vec<T> copy[kPixels];
#pragma GCC unroll 8
      for (int i = 0; i < kPixels; ++i) copy[i] = sum[i];
      finish_slowly(a, copy, q, pixels - q < kPixels ? int(pixels - q) : kPixels);
      continue;
    }
    if (activation == Activation::relu) {
#pragma GCC unroll 8
      for (int i = 0; i < kPixels; ++i) sum[i] = activate(Activation::relu, sum[i]);
    } else if (activation == Activation::relu6) {
#pragma GCC unroll 8
      for (int i = 0; i < kPixels; ++i) sum[i] = activate(Activation::relu6, sum[i]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kPixels; ++i) store(y + i * y_step, sum[i]);
  }
}

template <class T>
using RowFunction = void (*)(const PixelRow<T>&);

// For rows whose filter lies inside the input from top to bottom (`whole`), and for the others.
template <class T, int kPixels>
RowFunction<T> choose_row(const Conv2dProblem& a, bool whole) {
  if (a.dilation_w == 1 && a.stride_w == 1) {
    if (whole && a.R == 3 && a.S == 3) return multiply_row<T, kPixels, 3, 3, 1>;
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
  }
  if (a.dilation_w == 1 && a.stride_w == 2) {
    if (whole && a.R == 3 && a.S == 3) return multiply_row<T, kPixels, 3, 3, 2>;
    switch (a.S) {
      case 3:
        return multiply_row<T, kPixels, 0, 3, 2>;
      case 5:
        return multiply_row<T, kPixels, 0, 5, 2>;
      case 7:
        return multiply_row<T, kPixels, 0, 7, 2>;
    }
  }
  return multiply_row<T, kPixels, 0, 0, 0>;
}

// What one thread works in.
template <class T>
struct Scratch {
  T* weights;      // [vector][R][S][lane]
  T* bias;         // [vector][lane]
  int8_t* packed;  // [block of channels]: its weights and bias are there
  LineRing<T> ring;

  FC_INLINE Scratch(const Conv2dProblem& a, const ChannelBlocks<T>& blocks, Arena& arena)
      : weights(arena.take<T>(blocks.vectors * a.R * a.S * kLanes<T>)),
        bias(arena.take<T>(blocks.vectors * kLanes<T>)),
        packed(arena.take<int8_t>(blocks.of_vectors.parts)),
        ring(blocks.window, blocks.line_size(), arena) {}
};

template <class T>
int64_t scratch_bytes(const Conv2dProblem& a) {
  Arena arena(nullptr);
  Scratch<T>(a, ChannelBlocks<T>(a, pixels_of(a.Q)), arena);
  return arena.used();
}

}  // namespace

// --- run: one task is one output row of one sample, block of channels and block of columns. Rows come last in the order, so that
// a thread walks down the ring.
template <class T>
void depthwise_channels_run(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context) {
  constexpr int kL = kLanes<T>;
  const int64_t pixels = pixels_of(a.Q);
  const ChannelBlocks<T> blocks(a, pixels);
  const auto choose = [&](bool whole) { return pixels == 7 ? choose_row<T, 7>(a, whole) : choose_row<T, 8>(a, whole); };
  const RowFunction<T> multiply_whole = choose(true), multiply_clipped = choose(false);
  const int64_t per_thread = scratch_bytes<T>(a), multiplier = a.K / a.groups;
  parallel_ranges(context, a.N * blocks.q_blocks * blocks.of_vectors.parts * a.P, [&](int thread, int64_t begin, int64_t end) {
    Arena arena(static_cast<char*>(context.workspace) + thread * per_thread);
    Scratch<T> scratch(a, blocks, arena);
    for (int64_t i = 0; i < blocks.of_vectors.parts; ++i) scratch.packed[i] = 0;
    int64_t unit = begin / a.P - 1, p = a.P, n = 0, q0 = 0, v0 = 0, vectors = 0;
    for (int64_t task = begin; task < end; ++task, ++p) {
      if (p == a.P) {
        p = task == begin ? begin % a.P : 0;
        ++unit;
        const int64_t block = unit % blocks.of_vectors.parts;
        q0 = unit / blocks.of_vectors.parts % blocks.q_blocks * blocks.q_size;
        n = unit / blocks.of_vectors.parts / blocks.q_blocks;
        v0 = blocks.of_vectors.begin(block), vectors = blocks.of_vectors.size(block);
        scratch.ring.clear();
        if (!scratch.packed[block]) {
          pack_weights(a, multiplier, static_cast<const T*>(args.w), v0 * kL, vectors, scratch.weights + v0 * a.R * a.S * kL);
          for (int64_t k = v0 * kL; k < (v0 + vectors) * kL; ++k) {
            scratch.bias[k] = a.epilogue.bias && k < a.K ? static_cast<const T*>(args.bias)[k] : T(0);
          }
          scratch.packed[block] = 1;
        }
      }
      const int64_t h0 = p * a.stride_h - a.pad_top, w0 = q0 * a.stride_w - a.pad_left;
      scratch.ring.fetch_tile(a, p, 1, [&](const int64_t* h, T* const* to, int64_t count) {
        const T* x = static_cast<const T*>(args.x) + n * a.x.n;
        for (int64_t i = 0; i < count; ++i) {
          copy_channels(a, multiplier, x + h[i] * a.x.h, v0 * kL, vectors, w0, blocks.columns, to[i]);
        }
      });
      const Range taps = taps_inside(a.R, a.dilation_h, h0, a.H);
      PixelRow<T> row;
      row.lines = scratch.ring.lines + taps.begin * a.dilation_h;
      row.line_step = a.dilation_h;
      row.taps = taps.end > taps.begin ? taps.end - taps.begin : 0;
      row.S = a.S, row.stride = a.stride_w, row.dilation = a.dilation_w;
      row.pixels = a.Q - q0 < blocks.q_size ? a.Q - q0 : blocks.q_size;
      row.y_step = a.y.w;
      row.activation = a.epilogue.activation;
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t k = (v0 + v) * kL, y_offset = n * a.y.n + p * a.y.h + q0 * a.y.w + k;
        row.line_offset = v * blocks.columns * kL;
        row.w = scratch.weights + ((v0 + v) * a.R + taps.begin) * a.S * kL;
        row.lanes = a.K - k < kL ? int(a.K - k) : kL;
        row.y = static_cast<T*>(args.y) + y_offset;
        row.residual = a.epilogue.residual ? static_cast<const T*>(args.residual) + y_offset : nullptr;
        row.bias = scratch.bias + k;
        row.taps == a.R ? multiply_whole(row) : multiply_clipped(row);
      }
    }
  });
}

template <class T>
int64_t depthwise_channels_workspace(const Conv2dProblem& a, const Machine& machine) {
  return machine.threads * scratch_bytes<T>(a);
}

template void depthwise_channels_run<float>(const Conv2dProblem&, const Conv2dArgs&, const Context&);
template void depthwise_channels_run<double>(const Conv2dProblem&, const Conv2dArgs&, const Context&);
template int64_t depthwise_channels_workspace<float>(const Conv2dProblem&, const Machine&);
template int64_t depthwise_channels_workspace<double>(const Conv2dProblem&, const Machine&);

}  // namespace fastconv::FASTCONV_TARGET

// NCHW by way of NHWC: planes of a block of channels are transposed into scratch, convolved there with vectors over channels, and
// transposed back. For convolutions whose groups are independent, because then a block of groups needs no other.
//
// A transpose is a quarter of a shuffle for each element, in and out, where a 3x3 filter is nine sixteenths of an FMA: dear, but
// it has no tails. Along rows, 7x7 maps fill 7 of 16 lanes and 14x14 maps 14, every tap is an unaligned load, and a stride of 2
// makes the input gradient write every other element.
#pragma once

#include "cpu/blocks/conv2d_geometry.h"
#include "cpu/blocks/parallel.h"
#include "cpu/blocks/split.h"

namespace fastconv::FASTCONV_TARGET {

// What x and y of one part may take: with the lines of the loops a third to a half of a 1 MB L2. Parts that could be larger are
// cut at 64 KB, so that there are enough of them for several threads.
inline constexpr int64_t kStageBytes = 384 * 1024, kStageWanted = 128 * 1024;

FC_INLINE bool over_planes(const Conv2dProblem& a) { return a.x.w == 1 && a.y.w == 1; }

// Rows of x and of y that belong together.
struct StageRows {
  int64_t h, h_end, p, p_end;
};

// What rows begin .. end of y read of x; or which rows of y those of x (rows_of_x) get their gradient from.
FC_INLINE StageRows stage_rows(const Conv2dProblem& a, bool rows_of_x, int64_t begin, int64_t end) {
  const int64_t reach = (a.R - 1) * a.dilation_h;
  if (rows_of_x) {
    const int64_t p = clamp(ceil_div(begin + a.pad_top - reach, a.stride_h), 0, a.P - 1);
    return {begin, end, p, clamp(ceil_div(end + a.pad_top, a.stride_h), p + 1, a.P)};
  }
  const int64_t h = clamp(begin * a.stride_h - a.pad_top, 0, a.H - 1);
  return {h, clamp((end - 1) * a.stride_h - a.pad_top + reach + 1, h + 1, a.H), begin, end};
}

// A residual lies in planes: it is added on the way back, and what follows it.
FC_INLINE void leave_residual(const Conv2dProblem& a, Conv2dProblem& part) {
  part.epilogue.residual = false;
  if (a.epilogue.residual) part.epilogue.activation = Activation::none;
}

// A block of groups and of rows of one sample as a problem of its own in NHWC. The rows are of y, or of x in an input gradient.
struct StagePart {
  Conv2dProblem problem;
  int64_t g, h, p;  // the first group, row of x and row of y
};

template <class T>
struct Stage {
  int64_t unit;      // groups whose filters fill vectors
  EvenSplit blocks;  // of units
  EvenSplit chunks;  // of rows

  FC_INLINE Stage(const Conv2dProblem& a, bool rows_of_x) : unit(1), blocks(1, 1), chunks(1, 1) {
    const int64_t filters = a.K / a.groups, inputs = a.C / a.groups, rows = rows_of_x ? a.H : a.P;
    while (unit * filters % kLanes<T> != 0 || unit * inputs % kLanes<T> != 0) ++unit;
    const int64_t units = (a.groups + unit - 1) / unit;
    const int64_t x_row = unit * inputs * a.W * int64_t(sizeof(T)), y_row = unit * filters * a.Q * int64_t(sizeof(T));
    const int64_t bytes = x_row * a.H + y_row * a.P;
    blocks = EvenSplit(units, clamp(kStageWanted / (bytes < 1 ? 1 : bytes), 1, units));
    if (bytes <= kStageBytes) {
      chunks = EvenSplit(rows, rows);
      return;
    }
    // A row of the output, and the rows of the other tensor that it adds.
    const int64_t row = rows_of_x ? x_row + y_row / a.stride_h : y_row + x_row * a.stride_h;
    const int64_t halo = rows_of_x ? y_row * ((a.R - 1) * a.dilation_h / a.stride_h + 1) : x_row * ((a.R - 1) * a.dilation_h + 1);
    const int64_t least = a.R * a.dilation_h < 8 ? 8 : a.R * a.dilation_h;
    chunks = EvenSplit(rows, clamp((kStageBytes - halo) / row, least < rows ? least : rows, rows));
  }

  FC_INLINE StagePart part(const Conv2dProblem& a, bool rows_of_x, int64_t block, int64_t chunk) const {
    const int64_t filters = a.K / a.groups, inputs = a.C / a.groups, first = blocks.begin(block) * unit;
    const int64_t last = first + blocks.size(block) * unit, groups = (last < a.groups ? last : a.groups) - first;
    const int64_t begin = chunks.begin(chunk);
    const StageRows rows = stage_rows(a, rows_of_x, begin, begin + chunks.size(chunk));
    StagePart part = {a, first, rows.h, rows.p};
    Conv2dProblem& b = part.problem;
    b.N = 1, b.groups = groups, b.C = groups * inputs, b.K = groups * filters;
    b.H = rows.h_end - rows.h, b.P = rows.p_end - rows.p;
    b.pad_top = a.pad_top - rows.p * a.stride_h + rows.h;
    const int64_t x_step = round_up(b.C, kLanes<T>), y_step = round_up(b.K, kLanes<T>);
    b.x = {0, 1, a.W * x_step, x_step};
    b.y = {0, 1, a.Q * y_step, y_step};
    leave_residual(a, b);
    return part;
  }
};

FC_INLINE int64_t stage_x_size(const Conv2dProblem& b) { return b.H * b.x.h; }
FC_INLINE int64_t stage_y_size(const Conv2dProblem& b) { return b.P * b.y.h; }

// `channels` planes to [row][column][channel], pixels `step` apart; and back, with what is left of the epilogue. Behind the
// channels are zeros to the next whole vector, as far as a pixel has room for it; behind the last pixel a vector may be read.
// Planes that are read may have their columns from.w apart.
template <class T>
void planes_to_pixels(const T* planes, const Stride4& from, int64_t channels, int64_t rows, int64_t columns, T* pixels,
                      int64_t step);
template <class T>
void pixels_to_planes(const T* pixels, int64_t step, const Stride4& to, int64_t channels, int64_t rows, int64_t columns,
                      T* planes, const T* residual, Activation activation);

extern template void planes_to_pixels(const float*, const Stride4&, int64_t, int64_t, int64_t, float*, int64_t);
extern template void planes_to_pixels(const double*, const Stride4&, int64_t, int64_t, int64_t, double*, int64_t);
extern template void pixels_to_planes(const float*, int64_t, const Stride4&, int64_t, int64_t, int64_t, float*, const float*,
                                      Activation);
extern template void pixels_to_planes(const double*, int64_t, const Stride4&, int64_t, int64_t, int64_t, double*, const double*,
                                      Activation);

// The largest parts of a stage: scratch for x and y, and what the loops want for themselves.
struct StageSizes {
  int64_t x, y, inner;  // elements, elements, bytes
};

FC_INLINE StageSizes larger(const StageSizes& a, const StageSizes& b) {
  return {a.x > b.x ? a.x : b.x, a.y > b.y ? a.y : b.y, a.inner > b.inner ? a.inner : b.inner};
}

template <class T, auto kWorkspace>
StageSizes stage_sizes(const Conv2dProblem& a, const Stage<T>& stage, bool rows_of_x) {
  StageSizes most = {0, 0, 0};
  const Machine one_thread = {0, 1, 0, 0, 0};
  for (int64_t block = 0; block < stage.blocks.parts; ++block) {
    // Blocks have at most two sizes, and the last may lack groups.
    if (block > 0 && block + 1 < stage.blocks.parts && stage.blocks.size(block) == stage.blocks.size(block - 1)) continue;
    for (int64_t chunk = 0; chunk < stage.chunks.parts; ++chunk) {
      const Conv2dProblem b = stage.part(a, rows_of_x, block, chunk).problem;
      most = larger(most, {stage_x_size(b), stage_y_size(b), kWorkspace(b, one_thread)});
    }
  }
  return most;
}

// What one thread works in.
template <class T>
struct StageScratch {
  T *x, *y;
  char* inner;
  FC_INLINE StageScratch(const StageSizes& sizes, Arena& arena)
      : x(arena.take<T>(sizes.x)), y(arena.take<T>(sizes.y)), inner(arena.take<char>(sizes.inner)) {}
};

template <class T>
FC_INLINE int64_t stage_scratch_bytes(const StageSizes& sizes) {
  Arena arena(nullptr);
  StageScratch<T>(sizes, arena);
  return arena.used();
}

// kRun answers the same op on the part, forward or (kInputGradient) input gradient.
template <class T, bool kInputGradient, auto kRun, auto kWorkspace>
void staged_run(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context) {
  const Stage<T> stage(a, kInputGradient);
  const StageSizes sizes = stage_sizes<T, kWorkspace>(a, stage, kInputGradient);
  const int64_t per_thread = stage_scratch_bytes<T>(sizes), blocks = stage.blocks.parts, chunks = stage.chunks.parts;
  parallel_ranges(context, a.N * blocks * chunks, [&](int thread, int64_t begin, int64_t end) {
    Arena arena(static_cast<char*>(context.workspace) + thread * per_thread);
    const StageScratch<T> scratch(sizes, arena);
    const Machine one_thread = {context.machine->isa, 1, 0, 0, 0};
    for (int64_t task = begin; task < end; ++task) {
      const StagePart part = stage.part(a, kInputGradient, task / chunks % blocks, task % chunks);
      const Conv2dProblem& b = part.problem;
      const int64_t n = task / chunks / blocks, c = part.g * (a.C / a.groups), k = part.g * (a.K / a.groups);
      const int64_t x_offset = n * a.x.n + c * a.x.c + part.h * a.x.h, y_offset = n * a.y.n + k * a.y.c + part.p * a.y.h;
      Conv2dArgs sub = args;
      sub.x = scratch.x, sub.y = scratch.y, sub.residual = nullptr;
      sub.w = static_cast<T*>(args.w) + part.g * a.w.g;
      if (args.bias) sub.bias = static_cast<T*>(args.bias) + (kInputGradient ? c : k);
      const T* residual = a.epilogue.residual ? static_cast<const T*>(args.residual) : nullptr;
      const Activation left = a.epilogue.residual ? a.epilogue.activation : Activation::none;
      if constexpr (kInputGradient) {
        planes_to_pixels(static_cast<const T*>(args.y) + y_offset, a.y, b.K, b.P, a.Q, scratch.y, b.y.w);
        kRun(b, sub, Context{&one_thread, scratch.inner});
        pixels_to_planes(scratch.x, b.x.w, a.x, b.C, b.H, a.W, static_cast<T*>(args.x) + x_offset,
                         residual ? residual + x_offset : nullptr, left);
      } else {
        planes_to_pixels(static_cast<const T*>(args.x) + x_offset, a.x, b.C, b.H, a.W, scratch.x, b.x.w);
        kRun(b, sub, Context{&one_thread, scratch.inner});
        pixels_to_planes(scratch.y, b.y.w, a.y, b.K, b.P, a.Q, static_cast<T*>(args.y) + y_offset,
                         residual ? residual + y_offset : nullptr, left);
      }
    }
  });
}

template <class T, bool kInputGradient, auto kWorkspace>
int64_t staged_workspace(const Conv2dProblem& a, const Machine& machine) {
  return machine.threads * stage_scratch_bytes<T>(stage_sizes<T, kWorkspace>(a, Stage<T>(a, kInputGradient), kInputGradient));
}

}  // namespace fastconv::FASTCONV_TARGET

// conv2d_dgrad.subpixel: the input gradient with a stride, and so transposed convolution, as dense convolutions with a filter for
// each channel and position of a block of x, and a pixel shuffle (blocks/subpixel.h). The phases of core/input_phases.h, one by
// one, pack y as often as there are phases (1024 of them for a stride of 32), have no more filters than x has channels, and in
// NCHW write single elements.
//
//   tile       blocks/gemm_tile.h
//   transform  filters are copied in their new order, 256 KB at a time; results go to a stage of 512 KB a thread, in L2, and
//              from there to x (blocks/pixel_shuffle.h)
//   multiply   blocks/gemm_tile.cpp
//   run        blocks/filter_rows.cpp in NCHW, blocks/pixel_rows.cpp channels last: as many blocks of x as the stage takes
#include "cpu/blocks/filter_rows.h"
#include "cpu/blocks/input_gradient.h"
#include "cpu/blocks/parallel.h"
#include "cpu/blocks/pixel_rows.h"
#include "cpu/blocks/pixel_shuffle.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// What one thread may take in its L2 of 1 MB: the filters at hand, and the stage.
constexpr int64_t kFilterBytes = 256 << 10, kStageBytes = 512 << 10;
// Filters that share a packed pixel, where there are as many.
constexpr int64_t kEnoughFilters = 64;

bool channels_last(const Conv2dProblem& a) { return a.x.c == 1 && a.y.c == 1; }

// --- transform: how much of x is made at a time

// Channels of one group and residues of rows whose filters are copied together. All filters of 21 channels under 64x64 are 7 MB:
// copied at once they would go to memory and come back, which takes longer than the convolution.
struct Slice {
  int64_t channels, residues;

  template <class T>
  static Slice of(const Conv2dProblem& a) {
    const SubpixelAxis h = subpixel_rows(a), w = subpixel_columns(a);
    const int64_t depth = a.K / a.groups * h.taps_of(0) * w.taps_of(0), channels = a.C / a.groups;
    const int64_t fit = kFilterBytes / int64_t(sizeof(T)) / depth, filters = fit > kEnoughFilters ? fit : kEnoughFilters;
    if (channels * w.stride <= filters) return {channels, clamp(filters / (channels * w.stride), 1, h.stride)};
    const int64_t blocks = filters / (w.stride * h.stride);
    if (blocks >= kLanes<T> / 2) return {EvenSplit(channels, blocks).largest(), h.stride};
    return {EvenSplit(channels, clamp(filters / w.stride, 1, channels)).largest(), 1};
  }
};

// One slice of one group, as a problem of its own.
Conv2dProblem slice_problem(const Conv2dProblem& a, int64_t channels) {
  Conv2dProblem b = a;
  b.groups = 1, b.C = channels, b.K = a.K / a.groups;
  return b;
}

// The most that a stage holds of a slice.
template <class T>
StagedBlocks largest_stage(const Conv2dProblem& slice, int64_t residues, int threads) {
  const SubpixelAxis h = subpixel_rows(slice), w = subpixel_columns(slice);
  const int64_t row = residues * w.stride * slice.C * w.blocks * int64_t(sizeof(T));
  const int64_t rows = clamp(threads * kStageBytes / row, 1, slice.N * h.blocks);
  if (rows >= h.blocks) return {rows / h.blocks, 0, h.blocks, w.blocks};
  return {1, 0, EvenSplit(h.blocks, rows).largest(), w.blocks};
}

// --- run

// Scratch of all threads.
template <class T>
struct Scratch {
  T *filters, *bias, *stage;
  SubpixelTap* table;
  char* forward;  // what the forward side needs

  Scratch(Arena& arena, const Conv2dProblem& a, int threads) {
    const Slice size = Slice::of<T>(a);
    const Conv2dProblem slice = slice_problem(a, size.channels);
    const SubpixelPieces all(slice, 0, size.residues);  // the first residues have the most taps
    filters = arena.take<T>(all.filters);
    bias = arena.take<T>(a.epilogue.bias ? all.planes : 0);
    stage = arena.take<T>(all.planes * largest_stage<T>(slice, size.residues, threads).pixels());
    table = arena.take<SubpixelTap>(a.R * a.S);
    forward = arena.take<char>(0);
  }
};

// A piece of a stage as a forward problem.
Conv2dProblem staged_problem(const Conv2dProblem& slice, const SubpixelPiece& piece, const StagedBlocks& staged, bool last) {
  Conv2dProblem b = subpixel_problem(slice, piece, last);
  b.N = staged.samples, b.P = staged.rows, b.pad_top -= staged.row;
  const int64_t image = staged.rows * staged.columns;
  b.y = last ? Stride4{image * b.K, 1, staged.columns * b.K, b.K} : Stride4{image, staged.pixels(), staged.columns, 1};
  return b;
}

template <class T>
void run_stage(const Conv2dProblem& slice, const SubpixelPieces& all, const StagedBlocks& staged, const T* y, T* x,
               const Scratch<T>& scratch, const Context& context) {
  const bool last = channels_last(slice);
  Context inner = context;
  inner.workspace = scratch.forward;
  for (int i = 0; i < all.count; ++i) {
    const SubpixelPiece& piece = all.pieces[i];
    const Conv2dProblem b = staged_problem(slice, piece, staged, last);
    Conv2dArgs args = {};
    args.x = const_cast<T*>(y);
    args.w = scratch.filters + piece.filters;
    args.bias = scratch.bias;
    args.y = scratch.stage + piece.planes * staged.pixels();
    piece.empty() ? fill_phase<T>(b, args, inner) : last ? pixel_rows_run<T>(b, args, inner) : filter_rows_run<T>(b, args, inner);
  }
  const int64_t lines = last ? staged.rows : slice.C;
  parallel_ranges(context, staged.samples * lines, [&](int, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / lines, line = i % lines;
      last ? shuffle_pixels(slice, all, staged, scratch.stage, n, line, x + n * slice.x.n)
           : shuffle_plane(slice, all, staged, scratch.stage, n, line, x + n * slice.x.n + line * slice.x.c);
    }
  });
}

// visit(residues, staged) for all that a slice is cut into, residues outermost.
template <class Visit>
void for_each_stage(const Conv2dProblem& slice, int64_t residues, const StagedBlocks& most, const Visit& visit) {
  const SubpixelAxis h = subpixel_rows(slice);
  for (int64_t residue = 0; residue < h.stride; residue += residues) {
    const SubpixelPieces all(slice, residue, h.stride < residue + residues ? h.stride : residue + residues);
    bool first = true;
    for (int64_t n = 0; n < slice.N; n += most.samples) {
      for (int64_t row = 0; row < h.blocks; row += most.rows, first = false) {
        const int64_t samples = slice.N - n < most.samples ? slice.N - n : most.samples;
        const int64_t rows = h.blocks - row < most.rows ? h.blocks - row : most.rows;
        visit(all, first, n, StagedBlocks{samples, row, rows, most.columns});
      }
    }
  }
}

template <class T>
void run_slice(const Conv2dProblem& slice, int64_t residues, const T* y, const T* w, T* x, const Scratch<T>& scratch,
               const Context& context) {
  const StagedBlocks most = largest_stage<T>(slice, residues, context.machine->threads);
  for_each_stage(slice, residues, most, [&](const SubpixelPieces& all, bool first, int64_t n, const StagedBlocks& staged) {
    if (first) {
      const SubpixelFilters<T> filters(slice, all, channels_last(slice), scratch.table);
      parallel_ranges(context, filters.blocks(), [&](int, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) filters.copy(i, w, scratch.filters);
      });
    }
    run_stage(slice, all, staged, y + n * slice.y.n, x + n * slice.x.n, scratch, context);
  });
}

template <class T>
void run(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context) {
  Arena arena(context.workspace);
  const Scratch<T> scratch(arena, a, context.machine->threads);
  const Slice size = Slice::of<T>(a);
  const int64_t channels = a.C / a.groups, outputs = a.K / a.groups;
  for (int64_t g = 0; g < a.groups; ++g) {
    for (int64_t c = 0; c < channels; c += size.channels) {
      const Conv2dProblem slice = slice_problem(a, channels - c < size.channels ? channels - c : size.channels);
      const int64_t first = g * channels + c, biases = size.residues * a.stride_w * slice.C;
      for (int64_t i = 0; a.epilogue.bias && i < biases; ++i) {
        scratch.bias[i] = static_cast<const T*>(args.bias)[first + i % slice.C];
      }
      run_slice(slice, size.residues, static_cast<const T*>(args.y) + g * outputs * a.y.c,
                static_cast<const T*>(args.w) + g * a.w.g + c * a.w.c, static_cast<T*>(args.x) + first * a.x.c, scratch, context);
    }
  }
}

// --- contract
const char* reject(const Conv2dProblem& a) {
  if (a.stride_h * a.stride_w == 1) return "the stride is 1";
  if (a.dilation_h * a.dilation_w != 1) return "the filters are dilated";
  if (a.stride_w > kMaxShuffled) return "the stride is more than 64";
  if (a.pad_top < 0 || a.pad_left < 0) return "the padding is negative";
  if (channels_last(a) && a.groups > 1) return "channels of several groups lie side by side";
  if (a.epilogue.residual) return "a residual is not added between blocks";
  if (!channels_last(a) && (a.x.w != 1 || a.y.w != 1)) return "neither the channels nor the columns are contiguous in x and y";
  return nullptr;
}

template <class T>
int64_t workspace(const Conv2dProblem& a, const Machine& machine) {
  Arena arena(nullptr);
  const Scratch<T> scratch(arena, a, machine.threads);
  const Slice size = Slice::of<T>(a);
  int64_t forward = 0;
  // A smaller stage may need more: its problems are cut in other ways.
  const int64_t channels = a.C / a.groups;
  for (int64_t c = 0; c<channels; c += channels> size.channels ? channels - size.channels : size.channels) {
    const Conv2dProblem slice =
        slice_problem(a, c == 0 ? size.channels : channels - (channels - 1) / size.channels * size.channels);
    const StagedBlocks most = largest_stage<T>(slice, size.residues, machine.threads);
    const auto visit = [&](const SubpixelPieces& all, bool, int64_t, const StagedBlocks& staged) {
      for (int i = 0; i < all.count; ++i) {
        if (all.pieces[i].empty()) continue;
        const Conv2dProblem b = staged_problem(slice, all.pieces[i], staged, channels_last(a));
        const int64_t bytes = channels_last(a) ? pixel_rows_workspace<T>(b, machine) : filter_rows_workspace<T>(b, machine);
        forward = bytes > forward ? bytes : forward;
      }
    };
    for_each_stage(slice, size.residues, most, visit);
  }
  return arena.used() + forward;
}

template <class T>
double cost(const Conv2dProblem& a, const Machine& machine) {
  const bool last = channels_last(a);
  const Slice size = Slice::of<T>(a);
  const Conv2dProblem slice = slice_problem(a, size.channels);
  double seconds = 0, copied = 0;
  for (int64_t residue = 0; residue < a.stride_h; residue += size.residues) {
    const SubpixelPieces all(slice, residue, residue + size.residues < a.stride_h ? residue + size.residues : a.stride_h);
    copied += double(all.filters);
    for (int i = 0; i < all.count; ++i) {
      if (all.pieces[i].empty()) continue;
      Conv2dProblem b = subpixel_problem(slice, all.pieces[i], last);
      b.y.w = last ? b.K : 1;
      seconds += conv2d_flops(b) / (peak_flops<T>(machine) * (last ? pixel_rows_efficiency<T>(b) : filter_rows_efficiency<T>(b)));
    }
  }
  // Cycles for a copied element of a filter, two where vectors of it are stored whole, and for a vector of x that passes
  // through the stage.
  const double copy = last ? 5 : a.R <= a.stride_h && a.S <= a.stride_w ? 2 : 8;
  const double moved = double(a.N) * double(a.H) * double(a.W) * double(size.channels) / kLanes<T>;
  // A 1x1 filter's block is one result and zeros, which pointwise writes without a stage: in a third of the time.
  const double zeros = a.R * a.S == 1 ? 3 : 1;
  return zeros * double(a.C) / double(size.channels) * (seconds + (copy * copied + 8 * moved) / (3e9 * machine.threads));
}

template <class T>
constexpr Kernel<Conv2dProblem> kKernel = {1.0f, reject, cost<T>, workspace<T>, run<T>};

}  // namespace

extern constinit const Kernel<Conv2dProblem> conv2d_dgrad_subpixel_f32 = kKernel<float>;
extern constinit const Kernel<Conv2dProblem> conv2d_dgrad_subpixel_f64 = kKernel<double>;

}  // namespace fastconv::FASTCONV_TARGET

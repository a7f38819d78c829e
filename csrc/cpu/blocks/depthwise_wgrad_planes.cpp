// Depthwise and grouped weight gradient of NCHW planes, by way of NHWC (pixel_stage.h).
#include "cpu/blocks/depthwise_wgrad.h"
#include "cpu/blocks/pixel_stage.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- tile: depthwise_wgrad_channels.cpp, for one block of groups and of rows of one sample. Its sums are added sample by sample
// and block of rows by block of rows within a piece, and the pieces in their order.

template <class T>
struct Layout {
  Stage<T> stage;
  StageSizes sizes;
  EvenSplit pieces;             // of the N * chunks of rows
  int64_t filter_size, most_k;  // elements of one filter; filters of a block
  int64_t partial;              // elements of the sums of one piece: all filters, then their biases
  int64_t per_thread;           // bytes

  FC_INLINE explicit Layout(const Conv2dProblem& a)
      : stage(a, false),
        sizes(stage_sizes<T, depthwise_wgrad_channels_workspace<T>>(a, stage, false)),
        pieces(a.N * stage.chunks.parts, 1),
        filter_size(a.C / a.groups * a.R * a.S),
        most_k(stage.blocks.largest() * stage.unit * (a.K / a.groups)),
        partial(a.K * (filter_size + 1)) {
    const int64_t wanted = (kWantedTasks + stage.blocks.parts - 1) / stage.blocks.parts;
    pieces = EvenSplit(pieces.count, (pieces.count + wanted - 1) / wanted);
    per_thread = stage_scratch_bytes<T>(sizes) + round_up(most_k * (filter_size + 1) * int64_t(sizeof(T)), 64);
  }
  FC_INLINE int64_t partial_bytes() const { return round_up(pieces.parts * partial * int64_t(sizeof(T)), 64); }
};

// The gradient of one part goes to w [filter][input][R][S] and, behind it, the bias; both are added to sums.
template <class T>
void add_part(const Conv2dProblem& a, const Conv2dArgs& args, const StagePart& part, int64_t n, const StageScratch<T>& scratch,
              T* w, const Machine& machine, T* sums) {
  Conv2dProblem b = part.problem;
  const int64_t taps = a.R * a.S, inputs = a.C / a.groups, filters = a.K / a.groups, size = inputs * taps;
  b.w = {filters * size, size, taps, a.S, 1};
  const int64_t c = part.g * inputs, k = part.g * filters;
  const T* x = static_cast<const T*>(args.x) + n * a.x.n + c * a.x.c + part.h * a.x.h;
  const T* y = static_cast<const T*>(args.y) + n * a.y.n + k * a.y.c + part.p * a.y.h;
  planes_to_pixels(x, a.x, b.C, b.H, a.W, scratch.x, b.x.w);
  planes_to_pixels(y, a.y, b.K, b.P, a.Q, scratch.y, b.y.w);
  T* const bias = w + b.K * size;
  depthwise_wgrad_channels_run<T>(b, Conv2dArgs{scratch.x, w, bias, nullptr, scratch.y}, Context{&machine, scratch.inner});
  T* to = sums + k * size;
  for (int64_t i = 0; i < b.K * size; ++i) to[i] += w[i];
  if (!a.epilogue.bias) return;
  to = sums + a.K * size + k;
  for (int64_t i = 0; i < b.K; ++i) to[i] += bias[i];
}

template <class T>
void write_gradient(const Conv2dProblem& a, const Conv2dArgs& args, const T* sums) {
  const int64_t filters = a.K / a.groups, inputs = a.C / a.groups;
  const T* const bias = sums + a.K * inputs * a.R * a.S;
  for (int64_t k = 0; k < a.K; ++k) {
    T* w = static_cast<T*>(args.w) + k / filters * a.w.g + k % filters * a.w.k;
    for (int64_t c = 0; c < inputs; ++c) {
      for (int64_t r = 0; r < a.R; ++r) {
        for (int64_t s = 0; s < a.S; ++s) w[c * a.w.c + r * a.w.r + s * a.w.s] = *sums++;
      }
    }
    if (a.epilogue.bias) static_cast<T*>(args.bias)[k] = bias[k];
  }
}

}  // namespace

// --- run: one task is one block of groups and one piece of the samples and rows.
template <class T>
void depthwise_wgrad_planes_run(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context) {
  const Layout<T> layout(a);
  const int64_t pieces = layout.pieces.parts, chunks = layout.stage.chunks.parts, partial = layout.partial;
  T* const partials = static_cast<T*>(context.workspace);  // [piece][K filters, K biases]
  for (int64_t i = 0; i < pieces * partial; ++i) partials[i] = T(0);
  parallel_ranges(context, layout.stage.blocks.parts * pieces, [&](int thread, int64_t begin, int64_t end) {
    Arena arena(static_cast<char*>(context.workspace) + layout.partial_bytes() + thread * layout.per_thread);
    const StageScratch<T> scratch(layout.sizes, arena);
    T* const w = arena.take<T>(layout.most_k * (layout.filter_size + 1));
    const Machine one_thread = {context.machine->isa, 1, 0, 0, 0};
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task / pieces, piece = task % pieces, first = layout.pieces.begin(piece);
      for (int64_t i = first; i < first + layout.pieces.size(piece); ++i) {
        const StagePart part = layout.stage.part(a, false, block, i % chunks);
        add_part(a, args, part, i / chunks, scratch, w, one_thread, partials + piece * partial);
      }
    }
  });
  for (int64_t piece = 1; piece < pieces; ++piece) {
    const T* from = partials + piece * partial;
    for (int64_t i = 0; i < partial; ++i) partials[i] += from[i];
  }
  write_gradient(a, args, partials);
}

template <class T>
int64_t depthwise_wgrad_planes_workspace(const Conv2dProblem& a, const Machine& machine) {
  const Layout<T> layout(a);
  return layout.partial_bytes() + machine.threads * layout.per_thread;
}

template void depthwise_wgrad_planes_run<float>(const Conv2dProblem&, const Conv2dArgs&, const Context&);
template void depthwise_wgrad_planes_run<double>(const Conv2dProblem&, const Conv2dArgs&, const Context&);
template int64_t depthwise_wgrad_planes_workspace<float>(const Conv2dProblem&, const Machine&);
template int64_t depthwise_wgrad_planes_workspace<double>(const Conv2dProblem&, const Machine&);

}  // namespace fastconv::FASTCONV_TARGET

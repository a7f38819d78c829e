#include "cpu/blocks/filter_gradient.h"

#include "cpu/blocks/ahead.h"
#include "cpu/blocks/bias_gradient.h"
#include "cpu/blocks/gradient_pixels.h"
#include "cpu/blocks/parallel.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// Filters whose packed pixels are kept at a time: 512 x 256 floats are 512 KB, half of an L2.
constexpr int64_t kMaxFilters = 256;

// Linear's rows are images of one pixel: as one image of many pixels they are walked without a step between samples.
Conv2dProblem flatten(Conv2dProblem a) {
  if (a.R * a.S == 1 && a.H * a.W == 1 && a.P * a.Q == 1 && a.pad_top == 0 && a.pad_left == 0) {
    a.x.w = a.x.n, a.y.w = a.y.n;
    a.W = a.Q = a.N;
    a.N = a.stride_w = 1;
  }
  return a;
}

// --- the pixels of a chunk, channels last and without gaps between rows, to be fetched before they are packed

template <class S>
Ahead ahead(const S* first, const Stride4& strides, int64_t columns, const Chunk& chunk) {
  if (strides.c != 1 || strides.h != columns * strides.w || chunk.samples != 1) return {};
  return {first + chunk.n * strides.n + chunk.first * strides.w, chunk.pixels * strides.w};
}

// --- the sums: in w itself where a filter's channels are contiguous, else in [k][tap][c] of the workspace. Halves hold no sums:
// those of a task's block of filters are in its scratch, and rounded once.

template <class T>
bool sums_in_place(const Conv2dProblem& a) {
  return a.w.c == 1 && (!Columns::of<T>(a).whole_rows || a.w.s == a.C / a.groups);
}

template <class S>
int64_t sums_bytes(const Conv2dProblem& a) {
  if (kIsHalf<S> || sums_in_place<S>(a)) return 0;
  return round_up(a.K * a.R * a.S * (a.C / a.groups) * int64_t(sizeof(S)), 64);
}

template <class T>
void deliver(const Conv2dProblem& a, const T* sums, T* w, const Context& context) {
  constexpr int kL = kLanes<T>;
  const int64_t channels = a.C / a.groups, filters = a.K / a.groups, plane = a.R * a.S;
  const bool dense_plane = a.w.s == 1 && a.w.r == a.S;
  parallel_ranges(context, a.K, [&](int, int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const T* from = sums + k * plane * channels;
      T* to = w + k / filters * a.w.g + k % filters * a.w.k;
      for (int64_t t = 0; t < plane; t += dense_plane ? kL : 1) {
        if (dense_plane) {
          const int lanes = plane - t < kL ? int(plane - t) : kL;
          for_each_column(from + t * channels, channels, lanes, channels,
                          [&](int64_t c, vec<T> taps) { store(to + c * a.w.c + t, taps, lanes); });
        } else {
          for (int64_t c = 0; c < channels; ++c) to[c * a.w.c + t / a.S * a.w.r + t % a.S * a.w.s] = from[t * channels + c];
        }
      }
    }
  });
}

// Rounds `count` columns of `filters` filters of 1x1, the sums of which are `step` apart, to w.
template <class S>
void deliver_block(const compute_t<S>* sums, int64_t step, int64_t filters, int64_t count, const WeightStride& stride, S* w) {
  constexpr int kL = kLanes<compute_t<S>>;
  for (int64_t k = 0; k < filters; ++k, sums += step, w += stride.k) {
    for (int64_t c = 0; c < count; c += kL) {
      const int lanes = count - c < kL ? int(count - c) : kL;
      const auto value = load(sums + c, lanes);
      stride.c == 1 ? store(w + c, value, lanes) : store_strided(w + c * stride.c, stride.c, value, lanes);
    }
  }
}

// How the sums are shared out: panels of columns first, filters where there are too few panels.
struct Shares {
  Columns columns;
  EvenSplit vectors;  // the columns of a tap, in vectors, cut into panels
  int64_t panels;     // of one group: taps * panels of columns
  int64_t filter_splits;

  template <class T>
  static Shares of(const Conv2dProblem& a, int threads) {
    const Columns columns = Columns::of<T>(a);
    const EvenSplit vectors = columns.template vectors<T>();
    const int64_t panels = columns.taps * vectors.parts, tasks = panels * a.groups;
    return {columns, vectors, panels, tasks % threads == 0 || tasks >= 8 * threads ? 1 : threads};
  }
};

template <class S>
struct Scratch {
  using T = compute_t<S>;
  T* rows;             // [pixel][filters of a block]
  T* columns;          // [pixel][width]
  const T** pointers;  // [samples of a chunk][rows of the tile]
  Range* inside;       // [S]: the outputs whose input column lies inside
  T* sums;             // [filters of a block][channels], of halves

  Scratch(Arena& arena, const Conv2dProblem& a, const Chunks& chunks) {
    const int64_t filters = a.K / a.groups < kMaxFilters ? a.K / a.groups : kMaxFilters;
    rows = arena.take<T>(rows_in_place<S>(a) ? 0 : row_step<T>(filters) * chunks.largest());
    columns = arena.take<T>(chunks.largest() * GemmTile::kMaxVectors * kLanes<T>);
    pointers = arena.take<const T*>(chunks.samples.largest() * GemmTile::kMaxRows);
    inside = arena.take<Range>(a.S);
    sums = arena.take<T>(kIsHalf<S> ? filters * (a.C / a.groups) : 0);
    for (int64_t s = 0; inside && s < a.S; ++s) {
      inside[s] = outputs_inside(a.Q, a.stride_w, s * a.dilation_w - a.pad_left, a.W);
    }
  }
};

// Filters k0 .. k1 of group g against panels first .. last of columns.
struct Task {
  int64_t g, k0, k1, first_panel, last_panel;
};

// `sums` and their strides, but for those of halves.
template <class S>
void run_task(const Conv2dProblem& a, const Conv2dArgs& args, const Task& task, const Shares& shares, const Chunks& chunks,
              compute_t<S>* sums, const WeightStride& step, const Scratch<S>& scratch) {
  using T = compute_t<S>;
  const int64_t channels = a.C / a.groups, filters = a.K / a.groups;
  const EvenSplit blocks(task.k1 - task.k0, kMaxFilters);
  for (int64_t block = 0; block < blocks.parts; ++block) {
    const int64_t k_block = task.k0 + blocks.begin(block), count = blocks.size(block);
    T* const block_sums = kIsHalf<S> ? scratch.sums : sums + task.g * step.g + k_block * step.k;
    const int64_t sums_step = kIsHalf<S> ? channels : step.k;
    for (int64_t i = 0; i < chunks.count(); ++i) {
      const Chunk chunk = chunks.at(i);
      const int64_t pixels = chunk.samples * chunk.pixels;
      // The tiles of all panels have the same rows, so that the packed rows serve them all.
      const EvenSplit tiles(count, GemmTile::rows(int(shares.vectors.largest())));
      const S* y = static_cast<const S*>(args.y) + (task.g * filters + k_block) * a.y.c;
      const S* x = static_cast<const S*>(args.x) + task.g * channels * a.x.c;
      if (!rows_in_place<S>(a)) pack_rows(a, chunk, y, count, scratch.rows);
      Ahead next_y, next_x;
      if (i + 1 < chunks.count()) {
        next_y = ahead(y, a.y, a.Q, chunks.at(i + 1));
        if (a.P == a.H && a.Q == a.W) next_x = ahead(x, a.x, a.W, chunks.at(i + 1));
      }
      for (int64_t panel = task.first_panel; panel < task.last_panel; ++panel) {
        const int64_t tap = panel / shares.vectors.parts, part = panel % shares.vectors.parts;
        const int vectors = int(shares.vectors.size(part));
        const int64_t c0 = shares.vectors.begin(part) * kLanes<T>, width = vectors * kLanes<T>;
        const int64_t columns = shares.columns.count - c0 < width ? shares.columns.count - c0 : width;
        const int64_t r = shares.columns.whole_rows ? tap : tap / a.S, s = shares.columns.whole_rows ? 0 : tap % a.S;
        pack_columns(a, chunk, {shares.columns.whole_rows, r, s, c0, columns, width}, x, scratch.inside, scratch.columns);

        const ColumnPiece piece = {0, int32_t(columns), 0, 1};
        for (int64_t tile = 0; tile < tiles.parts; ++tile) {
          const int rows = int(tiles.size(tile));
          const T** a_rows = scratch.pointers;
          T* w[GemmTile::kMaxRows];
          for (int m = 0; m < rows; ++m) {
            w[m] = block_sums + (tiles.begin(tile) + m) * sums_step + c0 + r * step.r + s * step.s;
            a_rows[m] = scratch.rows + tiles.begin(tile) + m;
            if constexpr (!kIsHalf<S>) {
              for (int64_t n = 0; rows_in_place<S>(a) && n < chunk.samples; ++n) {
                a_rows[n * rows + m] = y + (tiles.begin(tile) + m) * a.y.c + (chunk.n + n) * a.y.n + chunk.first;
              }
            }
          }
          TileInput<T> in = rows_in_place<S>(a) ? TileInput<T>{a_rows, 1, scratch.columns, width, chunk.samples, chunk.pixels}
                                                : TileInput<T>{a_rows, row_step<T>(count), scratch.columns, width, 1, pixels};
          const TileOutput<T> out = {w, &piece, 1, i > 0, false, Activation::none, nullptr, nullptr, nullptr, nullptr};
          in.next = next_y.take(pixels);
          if (!in.next) in.next = next_x.take(pixels);
          gemm_tile(rows, vectors, in, out);
        }
      }
    }
    if constexpr (kIsHalf<S>) {
      const int64_t c0 = shares.vectors.begin(task.first_panel) * kLanes<T>,
                    end = shares.vectors.begin(task.last_panel) * kLanes<T>;
      S* const to = static_cast<S*>(args.w) + task.g * a.w.g + k_block * a.w.k + c0 * a.w.c;
      deliver_block(scratch.sums + c0, channels, count, (end < channels ? end : channels) - c0, a.w, to);
    }
  }
}

}  // namespace

template <class S>
int64_t filter_gradient_workspace(const Conv2dProblem& problem, const Machine& machine) {
  using T = compute_t<S>;
  const Conv2dProblem a = flatten(problem);
  Arena arena(nullptr);
  const Scratch<S> counted(arena, a, Chunks::of<T>(a));
  return arena.used() * machine.threads + sums_bytes<S>(a);
}

template <class S>
void filter_gradient_run(const Conv2dProblem& problem, const Conv2dArgs& args, const Context& context) {
  using T = compute_t<S>;
  const Conv2dProblem a = flatten(problem);
  const Chunks chunks = Chunks::of<T>(a);
  const Shares shares = Shares::of<T>(a, context.machine->threads);
  const int64_t filters = a.K / a.groups, channels = a.C / a.groups, plane = a.R * a.S;
  T* sums = static_cast<T*>(sums_in_place<T>(a) ? args.w : context.workspace);
  const WeightStride step =
      sums_in_place<T>(a) ? a.w : WeightStride{filters * plane * channels, plane * channels, 1, a.S * channels, channels};
  char* scratch_base = static_cast<char*>(context.workspace) + sums_bytes<S>(a);
  Arena counter(nullptr);
  const Scratch<S> counted(counter, a, chunks);

  parallel_ranges(context, a.groups * shares.filter_splits * shares.panels, [&](int thread, int64_t begin, int64_t end) {
    Arena arena(scratch_base + thread * counter.used());
    const Scratch<S> scratch(arena, a, chunks);
    for (int64_t i = begin; i < end;) {
      const int64_t panel = i % shares.panels, split = i / shares.panels % shares.filter_splits;
      const int64_t g = i / shares.panels / shares.filter_splits;
      const int64_t last = shares.panels - panel < end - i ? shares.panels : panel + end - i;
      const int64_t k0 = filters * split / shares.filter_splits, k1 = filters * (split + 1) / shares.filter_splits;
      if (k0 < k1) run_task(a, args, {g, k0, k1, panel, last}, shares, chunks, sums, step, scratch);
      i += last - panel;
    }
  });
  if (!kIsHalf<S> && !sums_in_place<T>(a)) deliver(a, sums, static_cast<T*>(args.w), context);
  if (a.epilogue.bias) bias_gradient<S>(a, args, context);
}

template <class S>
double filter_gradient_efficiency(const Conv2dProblem& problem) {
  using T = compute_t<S>;
  const Conv2dProblem a = flatten(problem);
  const double filters = double(a.K / a.groups);
  const int64_t columns = Columns::of<T>(a).count;
  const double lanes = double(columns) / double(round_up(columns, kLanes<T>));
  const double pixels = double(Chunks::of<T>(a).largest());
  const double start = pixels / (pixels + 12);  // a tile's prologue and stores take about as long as twelve steps
  const double pack = a.x.c == 1 ? 4 : 12;      // a packed pixel costs as much as its use by so many filters
  return 0.9 * lanes * start * filters / (filters + pack);
}

#define FC_FILTER_GRADIENT(S)                                                                    \
  template int64_t filter_gradient_workspace<S>(const Conv2dProblem&, const Machine&);           \
  template void filter_gradient_run<S>(const Conv2dProblem&, const Conv2dArgs&, const Context&); \
  template double filter_gradient_efficiency<S>(const Conv2dProblem&);
FC_FILTER_GRADIENT(float)
FC_FILTER_GRADIENT(double)
FC_FILTER_GRADIENT(bf16)
FC_FILTER_GRADIENT(f16)
#undef FC_FILTER_GRADIENT

}  // namespace fastconv::FASTCONV_TARGET

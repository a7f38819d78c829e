#include "cpu/blocks/winograd_filter_gradient.h"

#include "cpu/blocks/bias_gradient.h"
#include "cpu/blocks/gemm_tile.h"
#include "cpu/blocks/parallel.h"
#include "cpu/blocks/split.h"
#include "cpu/blocks/winograd_windows.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// The sums of a block of filters and channels: 36 x 64 x 64 floats are 590 KB of a 1 MB L2.
constexpr int64_t kSumBytes = 576 << 10;
// Those sums and the tiles that are added to them at a time, 30 of 64 channels and filters. A visit to the sums of a GEMM tile
// costs 250 cycles, so 30 tiles that crowd the L2 beat 14 that fit it: 190 to 238 GFLOP/s for 64 -> 64 channels of 56x56.
constexpr int64_t kBlockBytes = 1200 << 10;
// No more tiles than that: the sums are visited rarely enough, and positions of 64 tiles x 64 channels stay in L1.
constexpr int64_t kMaxTiles = 64;

// Cycles for one vector at one position: of a tile of x and of y with both in memory; of a visit to the sums.
constexpr double kInputCycles = 16, kOutputCycles = 12, kVisitCycles = 10;
// Where channels are not contiguous twice as many cycles are measured. The costs that these meet leave out part of it as well:
// 1.5 predicts who wins, 2 left 256 -> 256 channels of 14x14 to implicit_gemm, which takes 1.3 times as long.
constexpr double kTransposed = 1.5;
// The costs that these meet promise 0.9 of the FMA peak where kernels reach 0.7.
constexpr double kPromise = 0.77;

// Sizes of what is kept: x and y as [position][tile][width], the sums as [position][k][width].
template <class T, class F>
struct Blocking {
  static constexpr int64_t kL = kLanes<T>;
  EvenSplit vectors;     // the channels of a group, in vectors, cut into blocks
  int64_t most_filters;  // of a block
  int64_t tiles;         // at a time: whole rows of tiles where that fits
  int64_t splits;        // of the filters, where there are too few blocks for the threads

  Blocking(const Conv2dProblem& a, int threads)
      : vectors((a.C / a.groups + kL - 1) / kL, 1), most_filters(0), tiles(1), splits(1) {
    const int64_t filters = a.K / a.groups, area = kSumBytes / (F::kPositions * int64_t(sizeof(T)));
    int64_t side = kL;
    while ((side + kL) * (side + kL) <= area) side += kL;
    // Few filters leave room for more channels, and the other way round.
    const int64_t channels = filters < side ? area / round_up(filters, kL) / kL : side / kL;
    vectors = EvenSplit(vectors.count, channels);
    const EvenSplit blocks(filters, area / (vectors.largest() * kL));
    most_filters = blocks.largest();
    const int64_t tasks = a.groups * vectors.parts * blocks.parts;
    splits = blocks.parts * (tasks % threads == 0 || tasks >= 8 * threads ? 1 : threads);

    const int64_t sums = most_filters * vectors.largest() * kL, pair = most_filters + vectors.largest() * kL;
    const int64_t across = Grid<F>(a).across;
    const int64_t most = clamp((kBlockBytes / (F::kPositions * int64_t(sizeof(T))) - sums) / pair, 1, kMaxTiles);
    tiles = across >= most ? EvenSplit(across, most).largest() : most / across * across;
  }
  FC_INLINE int64_t width() const { return vectors.largest() * kL; }
  FC_INLINE int64_t y_width() const { return round_up(most_filters, kL); }
  FC_INLINE int64_t x_step() const { return tiles * width() + kL; }
  FC_INLINE int64_t y_step() const { return tiles * y_width() + kL; }
  FC_INLINE int64_t sum_step() const { return most_filters * width() + kL; }
};

// Scratch of one thread.
template <class T, class F>
struct Scratch {
  T *x, *y, *sums;
  T* strip;

  Scratch(Arena& arena, const Blocking<T, F>& blocking) {
    x = arena.take<T>(F::kPositions * blocking.x_step());
    y = arena.take<T>(F::kPositions * blocking.y_step());
    sums = arena.take<T>(F::kPositions * blocking.sum_step());
    strip = arena.take<T>(kStripElements<F, T>);
  }
};

// --- multiply: one block of tiles, added to the sums of every position

template <class T, class F>
void multiply(const Blocking<T, F>& blocking, const Scratch<T, F>& scratch, int64_t filters, int64_t vectors, int64_t tiles,
              bool accumulate) {
  const EvenSplit panels(vectors, GemmTile::kMaxVectors);
  const int64_t width = blocking.width();
  for (int64_t position = 0; position < F::kPositions; ++position) {
    for (int64_t panel = 0; panel < panels.parts; ++panel) {
      const int64_t c = panels.begin(panel) * kLanes<T>;
      const int columns = int(panels.size(panel));
      const ColumnPiece piece = {0, int32_t(columns * kLanes<T>), 0, 1};
      const EvenSplit rows(filters, GemmTile::rows(columns));
      for (int64_t part = 0; part < rows.parts; ++part) {
        const T* a_rows[GemmTile::kMaxRows];
        T* sums[GemmTile::kMaxRows];
        for (int64_t m = 0; m < rows.size(part); ++m) {
          a_rows[m] = scratch.y + position * blocking.y_step() + rows.begin(part) + m;
          sums[m] = scratch.sums + position * blocking.sum_step() + (rows.begin(part) + m) * width + c;
        }
        const TileInput<T> in = {a_rows, blocking.y_width(), scratch.x + position * blocking.x_step() + c, width, 1, tiles};
        const TileOutput<T> out = {sums, &piece, 1, accumulate, false, Activation::none, nullptr, nullptr, nullptr, nullptr};
        gemm_tile(int(rows.size(part)), columns, in, out);
      }
    }
  }
}

// --- transform: sums to w

// taps[r * kTaps + s] of one vector of channels.
template <class T, class F>
FC_INLINE void transform_sums(const T* sums, int64_t step, vec<T>* taps) {
  constexpr int kInput = F::kInput, kTaps = F::kTaps;
  vec<T> half[kTaps][kInput], line[kInput], mapped[kTaps];
  for (int j = 0; j < kInput; ++j) {
#pragma GCC unroll 8
    for (int i = 0; i < kInput; ++i) line[i] = load(sums + (i * kInput + j) * step);
    winograd_filter_gradient<F>(line, mapped);
#pragma GCC unroll 8
    for (int i = 0; i < kTaps; ++i) half[i][j] = mapped[i];
  }
#pragma GCC unroll 8
  for (int i = 0; i < kTaps; ++i) winograd_filter_gradient<F>(half[i], taps + i * kTaps);
}

// w points at filter 0, channel 0 of the block.
template <class T, class F>
void deliver(const Conv2dProblem& a, const Blocking<T, F>& blocking, const T* sums, int64_t filters, int64_t channels, T* w) {
  constexpr int kL = kLanes<T>, kTaps = F::kTaps, kPlane = kTaps * kTaps;
  const bool dense_plane = a.w.s == 1 && a.w.r == kTaps;
  for (int64_t k = 0; k < filters; ++k) {
    for (int64_t c = 0; c < channels; c += kL) {
      const int lanes = int(clamp(channels - c, 0, kL));
      vec<T> taps[kPlane];
      transform_sums<T, F>(sums + k * blocking.width() + c, blocking.sum_step(), taps);
      T* to = w + k * a.w.k + c * a.w.c;
      if (a.w.c == 1) {
#pragma GCC unroll 9
        for (int t = 0; t < kPlane; ++t) store(to + t / kTaps * a.w.r + t % kTaps * a.w.s, taps[t], lanes);
      } else if (dense_plane) {
        for (int t = 0; t < kPlane; t += kL) {
          vec<T> block[kL];
#pragma GCC unroll 16
          for (int m = 0; m < kL; ++m) block[m] = t + m < kPlane ? taps[t + m] : zero<T>();
          transpose(block);
          for (int lane = 0; lane < lanes; ++lane) store(to + lane * a.w.c + t, block[lane], kPlane - t);
        }
      } else {
        for (int t = 0; t < kPlane; ++t) {
          for (int lane = 0; lane < lanes; ++lane) to[lane * a.w.c + t / kTaps * a.w.r + t % kTaps * a.w.s] = taps[t].v[lane];
        }
      }
    }
  }
}

// --- run

// Of group g: filters k0 .. k1 against vectors first .. last of the channels.
struct Task {
  int64_t g, k0, k1, first, last;
};

template <class T, class F>
void run_task(const Conv2dProblem& a, const Conv2dArgs& args, const Task& task, const Blocking<T, F>& blocking,
              const Scratch<T, F>& scratch) {
  const int64_t channels = a.C / a.groups, filters = task.k1 - task.k0, c0 = task.first * kLanes<T>;
  const int64_t c = task.g * channels + c0, k = task.g * (a.K / a.groups) + task.k0;
  const int64_t columns = clamp(channels - c0, 0, (task.last - task.first) * kLanes<T>);
  const Grid<F> grid(a);
  const Image<T> x = {
      static_cast<const T*>(args.x) + c * a.x.c, a.x, a.H, a.W, columns, a.pad_top, a.pad_left, a.dilation_h, a.dilation_w};
  const Image<T> y = {static_cast<const T*>(args.y) + k * a.y.c, a.y, a.P, a.Q, filters, 0, 0, a.dilation_h, a.dilation_w};
  for (int64_t first = 0; first < grid.count; first += blocking.tiles) {
    const int64_t tiles = grid.count - first < blocking.tiles ? grid.count - first : blocking.tiles;
    transform_windows<F, InputWindow<F>>(x, grid, first, tiles, Positions<T>{scratch.x, blocking.x_step(), blocking.width()},
                                         scratch.strip);
    transform_windows<F, OutputWindow<F>>(y, grid, first, tiles, Positions<T>{scratch.y, blocking.y_step(), blocking.y_width()},
                                          scratch.strip);
    multiply<T, F>(blocking, scratch, filters, task.last - task.first, tiles, first > 0);
  }
  deliver<T, F>(a, blocking, scratch.sums, filters, columns,
                static_cast<T*>(args.w) + task.g * a.w.g + task.k0 * a.w.k + c0 * a.w.c);
}

}  // namespace

template <class T, class F>
int64_t winograd_filter_gradient_workspace(const Conv2dProblem& a, const Machine& machine) {
  const Blocking<T, F> blocking(a, machine.threads);
  Arena arena(nullptr);
  const Scratch<T, F> counted(arena, blocking);
  return arena.used() * machine.threads;
}

template <class T, class F>
void winograd_filter_gradient_run(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context) {
  const Blocking<T, F> blocking(a, context.machine->threads);
  const int64_t filters = a.K / a.groups, parts = blocking.vectors.parts;
  Arena counter(nullptr);
  const Scratch<T, F> counted(counter, blocking);
  parallel_ranges(context, a.groups * blocking.splits * parts, [&](int thread, int64_t begin, int64_t end) {
    Arena arena(static_cast<char*>(context.workspace) + thread * counter.used());
    const Scratch<T, F> scratch(arena, blocking);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t part = i % parts, split = i / parts % blocking.splits, first = blocking.vectors.begin(part);
      const Task task = {i / parts / blocking.splits, filters * split / blocking.splits, filters * (split + 1) / blocking.splits,
                         first, first + blocking.vectors.size(part)};
      if (task.k0 < task.k1) run_task<T, F>(a, args, task, blocking, scratch);
    }
  });
  if (a.epilogue.bias) bias_gradient<T>(a, args, context);
}

// Cycles on one core, counted in vectors at one position of a tile, measured on Cascade Lake. The GEMM tile runs at 0.74 of peak
// on pixels of L2.
template <class T, class F>
double winograd_filter_gradient_cost(const Conv2dProblem& a, const Machine& machine) {
  const Blocking<T, F> blocking(a, 1);
  const double tiles = double(Grid<F>(a).count), filters = double(a.K / a.groups), vectors = double(blocking.vectors.count);
  const double y_vectors = double(round_up(a.K / a.groups, kLanes<T>) / kLanes<T>);
  const double visits = tiles / double(blocking.tiles) + 1;  // the last one takes the sums to w
  const double multiply = filters * vectors * (tiles / (2 * 0.74) + visits * kVisitCycles);
  const double x = tiles * vectors * double(blocking.splits) * kInputCycles * (a.x.c == 1 ? 1 : kTransposed);
  const double y = tiles * y_vectors * double(blocking.vectors.parts) * kOutputCycles * (a.y.c == 1 ? 1 : kTransposed);
  return kPromise * double(a.groups) * double(F::kPositions) * (multiply + x + y) / (3e9 * machine.threads);
}

#define FC_WINOGRAD_FILTER_GRADIENT(m, r)                                                                              \
  template int64_t winograd_filter_gradient_workspace<float, F<m, r>>(const Conv2dProblem&, const Machine&);           \
  template void winograd_filter_gradient_run<float, F<m, r>>(const Conv2dProblem&, const Conv2dArgs&, const Context&); \
  template double winograd_filter_gradient_cost<float, F<m, r>>(const Conv2dProblem&, const Machine&);
FC_WINOGRAD_FILTER_GRADIENT(4, 3)

}  // namespace fastconv::FASTCONV_TARGET

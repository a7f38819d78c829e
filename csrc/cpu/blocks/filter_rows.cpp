#include "cpu/blocks/filter_rows.h"

#include "cpu/blocks/columns.h"
#include "cpu/blocks/conv2d_geometry.h"
#include "cpu/blocks/gemm_tile.h"
#include "cpu/blocks/parallel.h"
#include "cpu/blocks/pixel_panel.h"
#include "cpu/blocks/split.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// Elements of the reduction between two visits to y, when the filter plane allows. Constant, because it fixes the order of the
// sum.
constexpr int64_t kMaxDepth = 1024;
// What the packed pixels of one thread may take: half of the L2 of 1 MB of AVX-512 servers, the other half is for filters and y.
constexpr int64_t kMaxPanelBytes = 512 << 10;

// Where both images are gapless and the filter is 1x1, a plane is one long row.
Conv2dProblem flatten(Conv2dProblem a) {
  const bool pointwise = a.R * a.S == 1 && a.stride_h == 1 && a.stride_w == 1 && a.pad_top == 0 && a.pad_left == 0;
  if (pointwise && a.P == a.H && a.Q == a.W && a.x.h == a.W * a.x.w && a.y.h == a.Q * a.y.w) {
    a.W = a.Q = a.H * a.W;
    a.H = a.P = 1;
    a.x.h = a.W * a.x.w;
    a.y.h = a.Q * a.y.w;
  }
  return a;
}

// Whether a filter's channels and taps are one run of memory.
FC_INLINE bool filters_in_place(const Conv2dProblem& a) {
  return a.w.c == a.R * a.S && (a.R * a.S == 1 || (a.w.s == 1 && a.w.r == a.S));
}

struct Blocking {
  EvenSplit chunks;    // the channels of a group, so that chunk*R*S stays near kMaxDepth
  EvenSplit vectors;   // the pixels of the batch in vectors, cut into panels
  int64_t depth;       // of the largest chunk
  int64_t panel_size;  // elements of a packed panel, and the vector that pack_pixels may spill behind it
  int64_t panels_per_block;
  int64_t filter_splits;
  bool in_place;  // filters_in_place

  template <class T>
  static Blocking of(const Conv2dProblem& a, int threads) {
    const int64_t plane = a.R * a.S, fit = kMaxDepth / plane;
    const EvenSplit chunks(a.C / a.groups, fit > 1 ? fit : 1);
    const int64_t depth = chunks.largest() * plane;
    const EvenSplit vectors((a.N * a.P * a.Q + kLanes<T> - 1) / kLanes<T>, GemmTile::kMaxVectors);
    // With a short reduction the description of a panel outweighs its pixels.
    const int64_t description =
        int64_t(sizeof(PixelPanel)) + a.S * kMaxFills * int64_t(sizeof(PixelFill)) + a.R * kMaxColumns * 8;
    const int64_t bytes = depth * GemmTile::kMaxVectors * kLanes<T> * int64_t(sizeof(T)) + description;
    const int64_t panels = clamp(kMaxPanelBytes / bytes, 1, vectors.parts);
    const int64_t tasks = vectors.parts * a.groups;
    return {chunks,
            vectors,
            depth,
            (depth * GemmTile::kMaxVectors + 1) * kLanes<T>,
            panels,
            tasks % threads == 0 || tasks >= 8 * threads ? 1 : threads,
            filters_in_place(a)};
  }
};

// Scratch of one thread.
template <class T>
struct Scratch {
  T* pixels;           // [panels of a block][depth][columns]
  PixelPanel* panels;  // [panels of a block]

  Scratch(Arena& arena, const Blocking& blocking, const Conv2dProblem& a) {
    pixels = arena.take<T>(blocking.panels_per_block * blocking.panel_size);
    panels = arena.take<PixelPanel>(blocking.panels_per_block);
    PixelFill* fills = arena.take<PixelFill>(blocking.panels_per_block * a.S * kMaxFills);
    int64_t* row_offsets = arena.take<int64_t>(blocking.panels_per_block * a.R * kMaxColumns);
    for (int64_t i = 0; panels && i < blocking.panels_per_block; ++i) {
      panels[i].fills = fills + i * a.S * kMaxFills;
      panels[i].row_offsets = row_offsets + i * a.R * kMaxColumns;
    }
  }
};

// Filters that are not one run each (the input gradient reads them across) are copied once, for all threads: [k][c][r][s].
template <class T>
void copy_filters(const Conv2dProblem& a, const T* w, T* copy, const Context& context) {
  constexpr int kL = kLanes<T>;
  const int64_t channels = a.C / a.groups, filters = a.K / a.groups, plane = a.R * a.S;
  const EvenSplit blocks(filters, kL);
  parallel_ranges(context, a.groups * blocks.parts, [&](int, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t g = i / blocks.parts, k0 = blocks.begin(i % blocks.parts), count = blocks.size(i % blocks.parts);
      const T* from = w + g * a.w.g + k0 * a.w.k;
      T* to = copy + (g * filters + k0) * channels * plane;
      if (plane == 1 && a.w.k == 1) {  // a transposition
        for (int64_t c = 0; c < channels; c += kL) {
          const int lanes = channels - c < kL ? int(channels - c) : kL;
          for_each_column(from + c * a.w.c, a.w.c, lanes, count,
                          [&](int64_t k, vec<T> row) { store(to + k * channels + c, row, lanes); });
        }
        continue;
      }
      // Filters innermost: they are neighbours in the memory that is read.
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t k = 0; k < count; ++k) {
          const T* tap = from + c * a.w.c + k * a.w.k;
          T* out = to + (k * channels + c) * plane;
          for (int64_t r = 0; r < a.R; ++r) {
            for (int64_t s = 0; s < a.S; ++s) *out++ = tap[r * a.w.r + s * a.w.s];
          }
        }
      }
    }
  });
}

template <class T>
int64_t copy_bytes(const Conv2dProblem& a, const Blocking& blocking) {
  return blocking.in_place ? 0 : round_up(a.K * (a.C / a.groups) * a.R * a.S * int64_t(sizeof(T)), 64);
}

// Filters k0 .. k0+count of group g against panels first .. first+count of pixels.
struct Task {
  int64_t g, first_panel, panel_count, first_filter, filter_count;
};

template <class T>
void run_task(const Conv2dProblem& a, const Conv2dArgs& args, const Blocking& blocking, const Task& task, const T* w,
              const Scratch<T>& scratch) {
  const int64_t filters = a.K / a.groups, channels = a.C / a.groups, plane = a.R * a.S, pixels = a.N * a.P * a.Q;
  for (int64_t i = 0; i < task.panel_count; ++i) {
    const int64_t first = blocking.vectors.begin(task.first_panel + i) * kLanes<T>;
    const int vectors = int(blocking.vectors.size(task.first_panel + i)), columns = vectors * kLanes<T>;
    describe_panel(a, first, pixels - first < columns ? int(pixels - first) : columns, vectors, kLanes<T>, scratch.panels[i]);
  }
  for (int64_t chunk = 0; chunk < blocking.chunks.parts; ++chunk) {
    const int64_t c0 = blocking.chunks.begin(chunk), count = blocking.chunks.size(chunk);
    const T* x = static_cast<const T*>(args.x) + (task.g * channels + c0) * a.x.c;
    pack_pixels(a, x, count, scratch.panels, task.panel_count, blocking.panel_size, scratch.pixels);
    // Rows of the widest tile: every panel of the block meets them while they are in L1.
    const EvenSplit tiles(task.filter_count, GemmTile::rows(GemmTile::kMaxVectors));
    for (int64_t tile = 0; tile < tiles.parts; ++tile) {
      const int rows = int(tiles.size(tile));
      const int64_t k_in_group = task.first_filter + tiles.begin(tile), k = task.g * filters + k_in_group;
      const T* a_rows[GemmTile::kMaxRows];
      T* y[GemmTile::kMaxRows];
      for (int m = 0; m < rows; ++m) {
        a_rows[m] = w + task.g * a.w.g + (k_in_group + m) * a.w.k + c0 * plane;
        y[m] = static_cast<T*>(args.y) + (k + m) * a.y.c;
      }
      for (int64_t i = 0; i < task.panel_count; ++i) {
        const PixelPanel& panel = scratch.panels[i];
        const TileInput<T> in = {a_rows,       1, scratch.pixels + i * blocking.panel_size, panel.vectors * kLanes<T>, 1,
                                 count * plane};
        const TileOutput<T> out = {y,
                                   panel.pieces,
                                   panel.piece_count,
                                   chunk > 0,
                                   chunk == blocking.chunks.parts - 1,
                                   a.epilogue.activation,
                                   nullptr,
                                   a.epilogue.bias ? static_cast<const T*>(args.bias) + k : nullptr,
                                   a.epilogue.residual ? static_cast<const T*>(args.residual) : nullptr,
                                   static_cast<T*>(args.y)};
        gemm_tile(rows, panel.vectors, in, out);
      }
    }
  }
}

}  // namespace

template <class T>
int64_t filter_rows_workspace(const Conv2dProblem& problem, const Machine& machine) {
  const Conv2dProblem a = flatten(problem);
  const Blocking blocking = Blocking::of<T>(a, machine.threads);
  Arena arena(nullptr);
  const Scratch<T> counted(arena, blocking, a);
  return arena.used() * machine.threads + copy_bytes<T>(a, blocking);
}

template <class T>
void filter_rows_run(const Conv2dProblem& problem, const Conv2dArgs& args, const Context& context) {
  Conv2dProblem a = flatten(problem);
  const Blocking blocking = Blocking::of<T>(a, context.machine->threads);
  const int64_t filters = a.K / a.groups;
  char* scratch_base = static_cast<char*>(context.workspace) + copy_bytes<T>(a, blocking);
  const T* w = static_cast<const T*>(args.w);
  if (!blocking.in_place) {
    copy_filters(a, w, static_cast<T*>(context.workspace), context);
    w = static_cast<const T*>(context.workspace);
    a.w.k = a.C / a.groups * a.R * a.S;
    a.w.g = filters * a.w.k;
  }
  Arena counter(nullptr);
  const Scratch<T> counted(counter, blocking, a);

  const int64_t panels = blocking.vectors.parts, splits = blocking.filter_splits;
  parallel_ranges(context, a.groups * splits * panels, [&](int thread, int64_t begin, int64_t end) {
    Arena arena(scratch_base + thread * counter.used());
    const Scratch<T> scratch(arena, blocking, a);
    for (int64_t i = begin; i < end;) {
      const int64_t panel = i % panels, split = i / panels % splits, g = i / panels / splits;
      int64_t count = panels - panel < end - i ? panels - panel : end - i;
      if (count > blocking.panels_per_block) count = blocking.panels_per_block;
      const int64_t k0 = filters * split / splits, k1 = filters * (split + 1) / splits;
      if (k0 < k1) run_task(a, args, blocking, {g, panel, count, k0, k1 - k0}, w, scratch);
      i += count;
    }
  });
}

template <class T>
double filter_rows_efficiency(const Conv2dProblem& a) {
  const double filters = double(a.K / a.groups), pixels = double(a.N) * double(a.P) * double(a.Q);
  const double depth = double(a.R) * double(a.S) * double(a.C / a.groups);
  const double lanes = pixels / double(round_up(int64_t(pixels), kLanes<T>));
  const double start = depth / (depth + 12);  // a tile's prologue and stores take about as long as twelve steps
  // A vector of pixels is packed, and stored, in as many pieces as there are output rows in it: one on large maps, sixteen for
  // Linear's images of one pixel. A piece packed costs as much as its use by ten filters, fifty where it is gathered lane by
  // lane.
  const Conv2dProblem flat = flatten(a);
  const double pieces = flat.Q < kLanes<T> ? double(kLanes<T>) / double(flat.Q) : 1;
  const int64_t step = a.stride_w * a.x.w;
  const double pack = pieces * (step == 1 || flat.Q == 1 ? 10 : step == 2 ? 15 : 50);
  // A tile that ends in another sample leaves through memory, as all tiles of 7x7 maps do.
  const double samples = flat.P * flat.Q < 64 ? 1 : 64 / double(flat.P * flat.Q);
  const double scatter = depth / (depth + 16 * (pieces - 1) + 40 * samples + (a.y.w == 1 ? 0 : 200));
  // A copied filter element costs as much as its use by 32 pixels.
  const double copy = filters_in_place(a) ? 1 : pixels / (pixels + 32);
  // Linear's rows are transposed on their way in and out: 0.45 to 0.6 of the other side's speed from 768 to 4096 features.
  const double transposed = flat.P * flat.Q == 1 ? 0.55 : 1;
  return 0.9 * transposed * lanes * start * filters / (filters + pack) * scatter * copy;
}

template int64_t filter_rows_workspace<float>(const Conv2dProblem&, const Machine&);
template int64_t filter_rows_workspace<double>(const Conv2dProblem&, const Machine&);
template void filter_rows_run<float>(const Conv2dProblem&, const Conv2dArgs&, const Context&);
template void filter_rows_run<double>(const Conv2dProblem&, const Conv2dArgs&, const Context&);
template double filter_rows_efficiency<float>(const Conv2dProblem&);
template double filter_rows_efficiency<double>(const Conv2dProblem&);

}  // namespace fastconv::FASTCONV_TARGET

#include "cpu/blocks/pixel_rows.h"

#include "cpu/blocks/ahead.h"
#include "cpu/blocks/filter_panel.h"
#include "cpu/blocks/parallel.h"
#include "cpu/blocks/pixel_taps.h"
#include "cpu/blocks/thin_tile.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// What the packed panels of one thread may take. Where several fit, a tile's pixels meet them all while they are in L1, and y is
// written in long runs: 128 -> 512 channels of 28x28 went from 59 % to 68 % of peak. 640 KB hold two panels of 64 x 1152 (128
// channels of 3x3), which at batch 8 is worth 6 to 12 % over one, and leave a third of the L2 for pixels.
constexpr int64_t kMaxPanelBytes = 640 << 10;
// The same for kept panels, where others follow that are fetched into the L2 meanwhile. On 7x7 maps, whose filters come from
// memory, fetching made 1.04 to 1.24 times as fast, and room for what is fetched 1.04 to 1.15 more (Zen 5, filters not in a
// cache).
constexpr int64_t kMaxKeptBytes = 320 << 10;

// How the work is shared out: first over panels of filters, so that each is packed once, then over pixels.
struct Shares {
  EvenSplit vectors;   // the filters of one group, in vectors, cut into panels
  int64_t panel_size;  // elements of one packed panel
  int64_t panels_per_block;
  int64_t pixel_splits;

  template <class T>
  static Shares of(const Conv2dProblem& a, const Reduction& reduction, int threads) {
    const EvenSplit vectors(round_up(a.K / a.groups, kLanes<T>) / kLanes<T>, GemmTile::kMaxVectors);
    const int64_t size = reduction.taps_per_block * reduction.chunks.largest() * vectors.largest() * kLanes<T>;
    const int64_t bytes = size * int64_t(sizeof(T)), panels = a.groups * vectors.parts;
    const bool others = a.frozen && vectors.parts * bytes > kMaxPanelBytes;
    const int64_t fit = clamp((others ? kMaxKeptBytes : kMaxPanelBytes) / bytes, 1, vectors.parts);
    return {vectors, size, fit, panels % threads == 0 || panels >= 8 * threads ? 1 : threads};
  }
};

// Scratch of one thread.
template <class T>
struct Scratch {
  TilePointers<T> pointers;
  T* panels;            // [panels of a block][taps of a block][depth][width]
  int64_t* tap_offset;  // [filter positions of a block]

  Scratch(Arena& arena, const Reduction& reduction, const Shares& shares, const Conv2dProblem& a) : pointers(arena, reduction) {
    panels = arena.take<T>(shares.panels_per_block * shares.panel_size);
    tap_offset = arena.take<int64_t>(reduction.taps_per_block * (reduction.whole_rows ? a.S : 1));
  }
};

template <class W>
void pack_block(const Conv2dProblem& a, const Reduction& reduction, const Block& block, const W* w, int64_t filters,
                int64_t width, int64_t* tap_offset, compute_t<W>* panel) {
  const int64_t per_tap = reduction.whole_rows ? a.S : 1;
  for (int64_t t = 0; t < block.taps * per_tap; ++t) {
    const int64_t position = block.first * per_tap + t;
    tap_offset[t] = position / a.S * a.w.r + position % a.S * a.w.s;
  }
  const int64_t channels = block.depth / per_tap;
  pack_filters<W>(
      {w + (reduction.whole_rows ? 0 : block.begin * a.w.c), a.w.k, a.w.c, tap_offset, block.taps * per_tap, channels}, filters,
      width, panel);
}

// Where the packed panel of a block is, when all of them are kept: [group][block][panel].
FC_INLINE int64_t kept_panel(const Reduction& reduction, const Shares& shares, int64_t g, int64_t block, int64_t panel) {
  return ((g * reduction.blocks + block) * shares.vectors.parts + panel) * shares.panel_size;
}

// Packs one panel of one block of group g, from the filters of all groups.
template <class W>
void pack_panel(const Conv2dProblem& a, const Reduction& reduction, const Shares& shares, const Block& block, const W* w,
                int64_t g, int64_t panel, int64_t* tap_offset, compute_t<W>* to) {
  constexpr int kL = kLanes<compute_t<W>>;
  const int64_t vectors = shares.vectors.size(panel), k0 = shares.vectors.begin(panel) * kL;
  pack_block(a, reduction, block, w + g * a.w.g + k0 * a.w.k, a.K / a.groups - k0, vectors * kL, tap_offset, to);
}

// The same for a panel that is kept, in the precision of the filters. Halves are of 1x1 filters, and go by way of a few depths.
template <class W>
void keep_panel(const Conv2dProblem& a, const Reduction& reduction, const Shares& shares, const Block& block, const W* w,
                int64_t g, int64_t panel, int64_t* tap_offset, W* to) {
  using T = compute_t<W>;
  if constexpr (!kIsHalf<W>) {
    pack_panel(a, reduction, shares, block, w, g, panel, tap_offset, to);
  } else {
    constexpr int64_t kDepths = 4 * kLanes<T>;  // 16 KB of panel (AVX-512)
    T some[kDepths * GemmTile::kMaxVectors * kLanes<T>];
    const int64_t width = shares.vectors.size(panel) * kLanes<T>;
    for (int64_t d = 0; d < block.depth; d += kDepths) {
      Block part = block;
      part.begin += d, part.depth = block.depth - d < kDepths ? block.depth - d : kDepths;
      pack_panel(a, reduction, shares, part, w, g, panel, tap_offset, some);
      narrow_panel(some, part.depth * width, to + d * width);
    }
  }
}

// Panels first_panel .. +panel_count of group g, over pixels first .. last.
struct Task {
  int64_t g, first_panel, panel_count, first_pixel, last_pixel;
};

// The kept panels that follow those of block b of a task: of its next block, or of the next task.
template <class T>
Ahead kept_next(const Conv2dArgs& args, const Task& task, const Reduction& reduction, const Shares& shares, int64_t b) {
  const bool last = b + 1 == reduction.blocks;
  const int64_t panel = task.first_panel + (last ? task.panel_count : 0), left = shares.vectors.parts - panel;
  return Ahead(static_cast<const T*>(args.packed) + kept_panel(reduction, shares, task.g, last ? 0 : b + 1, panel),
               (left < task.panel_count ? left : task.panel_count) * shares.panel_size);
}

// What the tile after one of `rows` pixels, whose first reads from `first` on, reads under the last filter row; the rows above
// have been read by the tiles above. The hardware's prefetchers follow six pixels at a time too late. At batch 8 on one thread of
// a Zen 5, 1x1 from 1.1 (14x14 maps) to 1.8 times as fast (256 -> 64 channels of 56x56), strided 3x3 1.1 to 1.25; stems are 2 %
// slower.
template <class T>
FC_INLINE Ahead next_pixels(const Conv2dProblem& a, const Reduction& reduction, const T* first, int rows) {
  if (a.groups != 1 || a.x.w != a.C || reduction.whole_rows) return Ahead();
  const int64_t length = rows * a.stride_w * a.x.w;
  return Ahead(first + length + (a.R - 1) * a.dilation_h * a.x.h, length);
}

template <class W>
void run_task(const Conv2dProblem& a, const Conv2dArgs& args, const Task& task, const Reduction& reduction, const Shares& shares,
              const Scratch<compute_t<W>>& scratch) {
  using T = compute_t<W>;
  const int64_t filters = a.K / a.groups;
  const T* x = static_cast<const T*>(args.x) + task.g * (a.C / a.groups);
  // All panels of the task go through tiles of the same rows, those of the widest.
  const EvenSplit tiles(task.last_pixel - task.first_pixel, GemmTile::rows(int(shares.vectors.largest())));

  for (int64_t b = 0; b < reduction.blocks; ++b) {
    const Block block = block_at(a, reduction, b);
    const W* kept = static_cast<const W*>(args.packed) + kept_panel(reduction, shares, task.g, b, task.first_panel);
    const bool as_kept = args.packed && !kIsHalf<W>;
    const T* panels = as_kept ? reinterpret_cast<const T*>(kept) : scratch.panels;
    for (int64_t i = 0; !as_kept && i < task.panel_count; ++i) {
      T* const panel = scratch.panels + i * shares.panel_size;
      if (!args.packed) {
        pack_panel(a, reduction, shares, block, static_cast<const W*>(args.w), task.g, task.first_panel + i, scratch.tap_offset,
                   panel);
      } else {
        const int64_t width = shares.vectors.size(task.first_panel + i) * kLanes<T>;
        widen_panel(kept + i * shares.panel_size, block.taps * block.depth * width, panel);
      }
    }
    Ahead next = as_kept ? kept_next<T>(args, task, reduction, shares, b) : Ahead();
    find_offsets(a, reduction, block, scratch.pointers);
    Pixel pixel = {task.first_pixel / a.Q / a.P, task.first_pixel / a.Q % a.P, task.first_pixel % a.Q};
    for (int64_t tile = 0; tile < tiles.parts; ++tile) {
      const int rows = int(tiles.size(tile));
      T *y[GemmTile::kMaxRows], *y_panel[GemmTile::kMaxRows];
      const bool by_offset =
          point_tile(a, reduction, block, x, static_cast<T*>(args.y) + task.g * filters, rows, pixel, scratch.pointers, y);
      const int64_t* offsets = by_offset ? scratch.pointers.x_offset : nullptr;
      Ahead pixels = by_offset ? next_pixels(a, reduction, scratch.pointers.rows[0] - block.begin, rows) : Ahead();
      for (int64_t i = 0; i < task.panel_count; ++i) {
        const int64_t vectors = shares.vectors.size(task.first_panel + i),
                      k0 = shares.vectors.begin(task.first_panel + i) * kLanes<T>;
        const int64_t width = vectors * kLanes<T>;
        for (int m = 0; m < rows; ++m) y_panel[m] = y[m] + k0;
        const ColumnPiece piece = {0, int32_t(filters - k0 < width ? filters - k0 : width), 0, 1};
        const char* fetched = next.take(block.taps * block.depth);
        if (!fetched) fetched = pixels.take(block.taps * block.depth);
        const TileInput<T> in = {
            scratch.pointers.rows, 1, panels + i * shares.panel_size, width, block.taps, block.depth, offsets, fetched};
        const TileOutput<T> out = {y_panel,
                                   &piece,
                                   1,
                                   b > 0,
                                   b == reduction.blocks - 1,
                                   a.epilogue.activation,
                                   a.epilogue.bias ? static_cast<const T*>(args.bias) + task.g * filters + k0 : nullptr,
                                   nullptr,
                                   a.epilogue.residual ? static_cast<const T*>(args.residual) : nullptr,
                                   static_cast<T*>(args.y)};
        gemm_tile(rows, int(vectors), in, out);
      }
    }
  }
}

// A task of few pixels, Linear's rows: each filter is used too rarely to be worth packing. One vector of filters at a time goes
// through all blocks, so that memory is read in long runs: at 4096 x 4096, 7.6 GB/s where every panel stops at the end of a
// block.
// Kept halves are the exception, whose panels are read as they are.
template <class W>
FC_INLINE bool is_thin(const Conv2dProblem& a, const Conv2dArgs& args, const Task& task) {
  const bool as_it_is = args.packed ? kIsHalf<W> : a.w.c == 1;
  return as_it_is && a.R * a.S == 1 && task.last_pixel - task.first_pixel <= kThinRows;
}

template <class W>
void run_thin(const Conv2dProblem& a, const Conv2dArgs& args, const Task& task, const Reduction& reduction, const Shares& shares,
              const Scratch<compute_t<W>>& scratch) {
  using T = compute_t<W>;
  const int64_t filters = a.K / a.groups, first_k = shares.vectors.begin(task.first_panel) * kLanes<T>,
                last_k = clamp(shares.vectors.begin(task.first_panel + task.panel_count) * kLanes<T>, 0, filters);
  const int rows = int(task.last_pixel - task.first_pixel);
  const T* x = static_cast<const T*>(args.x) + task.g * (a.C / a.groups);
  int64_t panel = task.first_panel, step = kLanes<T>;
  for (int64_t k = first_k; k < last_k; k += step, ++panel) {
    if (args.packed) step = shares.vectors.size(panel) * kLanes<T>;
    for (int64_t b = 0; b < reduction.blocks; ++b) {
      const Block block = block_at(a, reduction, b);
      T* y[kThinRows];
      for (int m = 0; m < rows; ++m) {
        const int64_t pixel = task.first_pixel + m, q = pixel % a.Q, p = pixel / a.Q % a.P, n = pixel / a.Q / a.P;
        point_row(a, reduction, block, x, n, p, q, rows, m, scratch.pointers);
        y[m] = static_cast<T*>(args.y) + n * a.y.n + p * a.y.h + q * a.y.w + task.g * filters + k;
      }
      const ColumnPiece piece = {0, int32_t(last_k - k < step ? last_k - k : step), 0, 1};
      const T* bias = a.epilogue.bias ? static_cast<const T*>(args.bias) + task.g * filters + k : nullptr;
      const T* residual = a.epilogue.residual ? static_cast<const T*>(args.residual) : nullptr;
      const bool last = b == reduction.blocks - 1;
      const TileOutput<T> out = {
          y, &piece, 1, b > 0, last, a.epilogue.activation, bias, nullptr, residual, static_cast<T*>(args.y)};
      if constexpr (kIsHalf<W>) {
        if (args.packed) {
          const W* kept = static_cast<const W*>(args.packed) + kept_panel(reduction, shares, task.g, b, panel);
          thin_panel<W>(rows, int(step / kLanes<T>), {scratch.pointers.rows, kept, step, block.depth}, out);
          continue;
        }
      }
      const W* w = static_cast<const W*>(args.w) + task.g * a.w.g + k * a.w.k + block.begin;
      const ReadAhead ahead = ReadAhead::of_matrix(reduction.depth - block.begin, reduction.depth, kLanes<T>, a.w.k);
      thin_tile<W>(rows, {scratch.pointers.rows, w, a.w.k, piece.end, block.depth, ahead}, out);
    }
  }
}

// Few pixels, and filters that are neighbours under one channel, as in Linear's input gradient: panels are read where they lie.
// 9 rows of 3072 -> 768 take 0.31 ms so and 0.67 packed; 32 take 0.86, and 33, which are packed, 1.04 (Zen 5, one thread).
constexpr int64_t kAcrossRows = 32;

template <class W>
FC_INLINE bool is_across(const Conv2dProblem& a, const Conv2dArgs& args, const Task& task) {
  return !kIsHalf<W> && !args.packed && a.R * a.S == 1 && a.w.k == 1 && task.last_pixel - task.first_pixel <= kAcrossRows;
}

template <class W>
void run_across(const Conv2dProblem& a, const Conv2dArgs& args, const Task& task, const Reduction& reduction,
                const Shares& shares, const Scratch<compute_t<W>>& scratch) {
  using T = compute_t<W>;
  constexpr int64_t kL = kLanes<T>;
  const int64_t filters = a.K / a.groups, first_k = shares.vectors.begin(task.first_panel) * kL,
                last_k = clamp(shares.vectors.begin(task.first_panel + task.panel_count) * kL, 0, filters);
  const int64_t pixels = task.last_pixel - task.first_pixel;
  const int64_t most = pixels <= GemmTile::rows(GemmTile::kMaxVectors) ? GemmTile::kMaxVectors : GemmTile::kMaxVectors - 1;
  const EvenSplit tiles(pixels, GemmTile::rows(int(most)));
  const T* x = static_cast<const T*>(args.x) + task.g * (a.C / a.groups);
  for (int64_t k = first_k; k < last_k;) {
    // Less than a vector is packed, behind the last of which there may be nothing.
    const bool whole = last_k - k >= kL;
    const int64_t vectors = whole ? clamp((last_k - k) / kL, 1, most) : 1;
    for (int64_t b = 0; b < reduction.blocks; ++b) {
      const Block block = block_at(a, reduction, b);
      const W* w = static_cast<const W*>(args.w) + task.g * a.w.g + k;
      if (!whole) pack_block(a, reduction, block, w, last_k - k, kL, scratch.tap_offset, scratch.panels);
      const T* panel = whole ? reinterpret_cast<const T*>(w) + block.begin * a.w.c : scratch.panels;
      for (int64_t tile = 0; tile < tiles.parts; ++tile) {
        const int rows = int(tiles.size(tile));
        T* y[GemmTile::kMaxRows];
        for (int m = 0; m < rows; ++m) {
          const int64_t pixel = task.first_pixel + tiles.begin(tile) + m, q = pixel % a.Q, p = pixel / a.Q % a.P,
                        n = pixel / a.Q / a.P;
          point_row(a, reduction, block, x, n, p, q, rows, m, scratch.pointers);
          y[m] = static_cast<T*>(args.y) + n * a.y.n + p * a.y.h + q * a.y.w + task.g * filters + k;
        }
        const ColumnPiece piece = {0, int32_t(whole ? vectors * kL : last_k - k), 0, 1};
        const TileInput<T> in = {scratch.pointers.rows, 1, panel, whole ? a.w.c : kL, 1, block.depth};
        const TileOutput<T> out = {y,
                                   &piece,
                                   1,
                                   b > 0,
                                   b == reduction.blocks - 1,
                                   a.epilogue.activation,
                                   a.epilogue.bias ? static_cast<const T*>(args.bias) + task.g * filters + k : nullptr,
                                   nullptr,
                                   a.epilogue.residual ? static_cast<const T*>(args.residual) : nullptr,
                                   static_cast<T*>(args.y)};
        gemm_tile(rows, int(vectors), in, out);
      }
    }
    k += whole ? vectors * kL : last_k - k;
  }
}

}  // namespace

const char* pixel_rows_reject(const Conv2dProblem& a) {
  if (a.x.c != 1) return "reads pixels as runs of channels, and the channels of x are not contiguous (channels_last is)";
  if (a.y.c != 1) return "writes pixels as runs of filters, and the channels of y are not contiguous (channels_last is)";
  return nullptr;
}

template <class W>
int64_t pixel_rows_workspace(const Conv2dProblem& a, const Machine& machine) {
  using T = compute_t<W>;
  const Reduction reduction(a);
  Arena arena(nullptr);
  const Scratch<T> counted(arena, reduction, Shares::of<T>(a, reduction, machine.threads), a);
  return arena.used() * machine.threads;
}

template <class W>
void pixel_rows_run(const Conv2dProblem& images, const Conv2dArgs& args, const Context& context) {
  using T = compute_t<W>;
  const Conv2dProblem a = as_one_row(images);
  const Reduction reduction(a);
  const Shares shares = Shares::of<T>(a, reduction, context.machine->threads);
  const int64_t panels = shares.vectors.parts, splits = shares.pixel_splits, pixels = a.N * a.P * a.Q;
  Arena counter(nullptr);
  const Scratch<T> counted(counter, reduction, shares, a);

  parallel_ranges(context, a.groups * splits * panels, [&](int thread, int64_t begin, int64_t end) {
    Arena arena(static_cast<char*>(context.workspace) + thread * counter.used());
    const Scratch<T> scratch(arena, reduction, shares, a);
    for (int64_t i = 0; i < reduction.chunks.largest(); ++i) scratch.pointers.zeros[i] = T(0);
    for (int64_t i = begin; i < end;) {
      const int64_t panel = i % panels, split = i / panels % splits, g = i / panels / splits;
      int64_t count = panels - panel < end - i ? panels - panel : end - i;
      if (count > shares.panels_per_block) count = shares.panels_per_block;
      const int64_t first = pixels * split / splits, last = pixels * (split + 1) / splits;
      const Task task = {g, panel, count, first, last};
      const auto run = is_thin<W>(a, args, task) ? run_thin<W> : is_across<W>(a, args, task) ? run_across<W> : run_task<W>;
      if (first < last) run(a, args, task, reduction, shares, scratch);
      i += count;
    }
  });
}

// A single pixel uses each filter once, whether it lies packed or not: at 4096 x 4096 both stream from memory at 10.3 GB/s, at
// 25088 x 4096 at 11.3 as it is and at 10.7 packed. From two pixels on packed filters are the faster, 1.2 times with four. Halves
// cost as much to transpose as to read: f16 comes at 7.6 GB/s as it is and at 9.1 packed, bf16 at 9.2 and 9.9.
template <class W>
PackedFilters pixel_rows_packed(const Conv2dProblem& a) {
  if (!kIsHalf<W> && a.R * a.S == 1 && a.w.c == 1 && a.N * a.P * a.Q == 1) return {};
  const Reduction reduction(a);
  const Shares shares = Shares::of<compute_t<W>>(a, reduction, 1);
  return {kept_panel(reduction, shares, a.groups, 0, 0) * int64_t(sizeof(W)), reduction.whole_rows};
}

template <class W>
void pixel_rows_pack(const Conv2dProblem& a, const void* w, void* packed) {
  const Reduction reduction(a);
  const Shares shares = Shares::of<compute_t<W>>(a, reduction, 1);
  int64_t tap_offset[kMaxDepth];
  for (int64_t g = 0; g < a.groups; ++g) {
    for (int64_t b = 0; b < reduction.blocks; ++b) {
      for (int64_t panel = 0; panel < shares.vectors.parts; ++panel) {
        keep_panel(a, reduction, shares, block_at(a, reduction, b), static_cast<const W*>(w), g, panel, tap_offset,
                   static_cast<W*>(packed) + kept_panel(reduction, shares, g, b, panel));
      }
    }
  }
}

template <class W>
double pixel_rows_efficiency(const Conv2dProblem& a) {
  using T = compute_t<W>;
  const double filters = double(a.K / a.groups), vectors = double(round_up(a.K / a.groups, kLanes<T>)) / kLanes<T>;
  const double lanes = filters / (vectors * kLanes<T>);
  const double depth = double(a.R) * double(a.S) * double(a.C / a.groups);
  // A tile's prologue and stores take about as long as twelve steps, and going to a tap as long as eight steps of its channels:
  // 48 groups of one channel took 5 times as long as without this.
  const int64_t channels = a.C / a.groups, steps = channels < 8 && !Reduction(a).whole_rows ? (8 - channels) * a.R * a.S : 0;
  const double start = depth / (depth + 12 + double(steps));
  const double wide = vectors >= 4 ? 1 : vectors >= 2 ? 0.9 : 0.7;  // loads per FMA of the narrow tiles
  const double pixels = double(a.N) * double(a.P) * double(a.Q);
  // A packed element costs as much as its use by 16 pixels where it is transposed, by 4 where it is copied or only read.
  const double packing = pixels / (pixels + (a.w.k == 1 || a.frozen ? 4 : 16));
  return 0.92 * lanes * start * wide * packing;
}

#define FC_PIXEL_ROWS(T)                                                                    \
  template int64_t pixel_rows_workspace<T>(const Conv2dProblem&, const Machine&);           \
  template void pixel_rows_run<T>(const Conv2dProblem&, const Conv2dArgs&, const Context&); \
  template PackedFilters pixel_rows_packed<T>(const Conv2dProblem&);                        \
  template void pixel_rows_pack<T>(const Conv2dProblem&, const void*, void*);               \
  template double pixel_rows_efficiency<T>(const Conv2dProblem&);
FC_PIXEL_ROWS(float)
FC_PIXEL_ROWS(double)
FC_PIXEL_ROWS(bf16)
FC_PIXEL_ROWS(f16)
#undef FC_PIXEL_ROWS

}  // namespace fastconv::FASTCONV_TARGET

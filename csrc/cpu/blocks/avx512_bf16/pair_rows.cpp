#include "cpu/blocks/avx512_bf16/pair_rows.h"

#include "cpu/blocks/avx512_bf16/pair_tile.h"
#include "cpu/blocks/conv2d_geometry.h"
#include "cpu/blocks/parallel.h"
#include "cpu/blocks/split.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

constexpr int kL = kLanes<float>;

// Pairs between two visits to the sums: a panel of 64 filters takes 384 KB, within the L2 of 1 MB of every CPU with these
// instructions.
constexpr int64_t kMaxPairs = 1536;
// What the packed panels of one thread may take: where several fit, a tile's pixels meet them all while they are in the L1.
constexpr int64_t kMaxPanelBytes = 640 << 10;
// Pixels whose sums wait in scratch where there are several blocks: filters are packed again for each chunk of them, which costs
// as much as 16 pixels.
constexpr int64_t kChunkPixels = 384;

struct Cut {
  int64_t depth, pairs;
  EvenSplit blocks;   // of the pairs
  EvenSplit vectors;  // of the filters of one group, cut into panels
  int64_t panels_per_visit, pixel_splits;

  FC_INLINE Cut(const Conv2dProblem& a, int threads)
      : depth(a.C / a.groups),
        pairs((depth + 1) / 2),
        blocks(pairs, kMaxPairs),
        vectors(round_up(a.K / a.groups, kL) / kL, GemmTile::kMaxVectors) {
    const int64_t panels = a.groups * vectors.parts;
    panels_per_visit = blocks.parts > 1 ? 1 : clamp(kMaxPanelBytes / (panel_size() * int64_t(sizeof(bf16))), 1, vectors.parts);
    pixel_splits = panels % threads == 0 || panels >= 8 * threads ? 1 : threads;
  }
  FC_INLINE int64_t width(int64_t panel) const { return vectors.size(panel) * kL; }
  // Numbers of the widest packed panel of a block, and of all blocks.
  FC_INLINE int64_t panel_size() const { return blocks.largest() * vectors.largest() * kL * 2; }
  FC_INLINE int64_t kept_size() const { return pairs * vectors.largest() * kL * 2; }
};

struct Scratch {
  bf16 *panels, *zeros, *padded;  // [panels of a visit][pairs of a block], [depth], [rows of a tile][depth + 1] where that is odd
  float* sums;                    // [pixels of a chunk][width] where there are several blocks

  FC_INLINE Scratch(Arena& arena, const Cut& cut) {
    panels = arena.take<bf16>(cut.panels_per_visit * cut.panel_size());
    zeros = arena.take<bf16>(2 * cut.pairs);
    padded = arena.take<bf16>(cut.depth % 2 ? GemmTile::kMaxRows * 2 * cut.pairs : 0);
    sums = arena.take<float>(cut.blocks.parts > 1 ? kChunkPixels * cut.vectors.largest() * kL : 0);
  }
};

// Panels first_panel .. +panel_count of group g, over pixels first .. last.
struct Task {
  int64_t g, first_panel, panel_count, first_pixel, last_pixel;
};

struct Call {
  const Conv2dProblem& a;
  const Conv2dArgs& args;
  const Cut& cut;
  const Scratch& scratch;

  // The rows of a tile: what pixels first .. first + rows - 1 read, all of their channels, and where they are written.
  FC_INLINE void point(int64_t g, int64_t first, int rows, const bf16** x, bf16** y) const {
    int64_t q = first % a.Q, p = first / a.Q % a.P, n = first / a.Q / a.P;
    for (int m = 0; m < rows; ++m) {
      const int64_t h = p * a.stride_h - a.pad_top, w = q * a.stride_w - a.pad_left;
      const bool inside = uint64_t(h) < uint64_t(a.H) && uint64_t(w) < uint64_t(a.W);
      x[m] = inside ? static_cast<const bf16*>(args.x) + n * a.x.n + h * a.x.h + w * a.x.w + g * cut.depth : scratch.zeros;
      y[m] = static_cast<bf16*>(args.y) + n * a.y.n + p * a.y.h + q * a.y.w + g * (a.K / a.groups);
      if (cut.depth % 2 && inside) {
        bf16* const to = scratch.padded + m * 2 * cut.pairs;
        __builtin_memcpy(to, x[m], size_t(cut.depth) * sizeof(bf16));
        to[cut.depth] = bf16{0};
        x[m] = to;
      }
      if (++q == a.Q) {
        q = 0;
        if (++p == a.P) p = 0, ++n;
      }
    }
  }

  FC_INLINE PairOutput output(int64_t g, int64_t k, int64_t width, bf16* const* y) const {
    const int64_t left = a.K / a.groups - k;
    return {nullptr,
            nullptr,
            y,
            int(left < width ? left : width),
            a.epilogue.activation,
            a.epilogue.bias ? static_cast<const bf16*>(args.bias) + g * (a.K / a.groups) + k : nullptr,
            a.epilogue.residual ? static_cast<const bf16*>(args.residual) : nullptr,
            static_cast<const bf16*>(args.y)};
  }

  FC_INLINE const bf16* filters(int64_t g, int64_t k, int64_t channel) const {
    return static_cast<const bf16*>(args.w) + g * a.w.g + k * a.w.k + channel * a.w.c;
  }

  // One block of the reduction, over pixels first .. first + count - 1.
  void run_block(const Task& task, int64_t block, int64_t first, int64_t count) const {
    const int64_t begin = cut.blocks.begin(block), pairs = cut.blocks.size(block), filters_of_group = a.K / a.groups;
    const bool last = block == cut.blocks.parts - 1, thin = count <= kThinPairRows;
    for (int64_t i = 0; !args.packed && i < task.panel_count; ++i) {
      const int64_t panel = task.first_panel + i, k = cut.vectors.begin(panel) * kL;
      const int64_t depth = last ? cut.depth - 2 * begin : 2 * pairs;
      pack_pairs({filters(task.g, k, 2 * begin), a.w.k, a.w.c, depth}, filters_of_group - k, cut.width(panel),
                 scratch.panels + i * cut.panel_size());
    }
    const bf16* const kept = static_cast<const bf16*>(args.packed);
    // 8 rows are two tiles of 4: panels come from the L2 for the second. One of 8, two vectors at a time, reads memory by half
    // lines and takes 1.25 times as long.
    const EvenSplit tiles(count, GemmTile::rows(int(cut.vectors.largest())));
    for (int64_t t = 0; t < tiles.parts; ++t) {
      const int rows = int(tiles.size(t));
      const bf16* x[GemmTile::kMaxRows];
      bf16 *y[GemmTile::kMaxRows], *y_panel[GemmTile::kMaxRows];
      point(task.g, first + tiles.begin(t), rows, x, y);
      for (int m = 0; m < rows; ++m) x[m] += 2 * begin;
      for (int64_t i = 0; i < task.panel_count; ++i) {
        const int64_t panel = task.first_panel + i, width = cut.width(panel), k = cut.vectors.begin(panel) * kL;
        for (int m = 0; m < rows; ++m) y_panel[m] = y[m] + k;
        PairOutput out = output(task.g, k, width, y_panel);
        float* const sums = scratch.sums + tiles.begin(t) * width;
        if (block > 0) out.before = sums;
        if (!last) out.sums = sums;
        const bf16* const b = kept ? kept + (task.g * cut.vectors.parts + panel) * cut.kept_size() + begin * width * 2
                                   : scratch.panels + i * cut.panel_size();
        pair_tile(rows, int(cut.vectors.size(panel)), {x, b, width, pairs, thin ? kAheadInMemory : kAheadInL2}, out);
      }
    }
  }

  void run(const Task& task) const {
    const bool once = cut.blocks.parts == 1;
    const EvenSplit chunks(task.last_pixel - task.first_pixel, once ? task.last_pixel - task.first_pixel : kChunkPixels);
    for (int64_t i = 0; i < chunks.parts; ++i) {
      for (int64_t b = 0; b < cut.blocks.parts; ++b) run_block(task, b, task.first_pixel + chunks.begin(i), chunks.size(i));
    }
  }

  // Few pixels: filters are used too rarely to be worth packing, and each is read in one run.
  FC_INLINE bool is_thin(const Task& task) const {
    return !args.packed && a.w.c == 1 && task.last_pixel - task.first_pixel <= kThinPairRows;
  }
  void run_thin(const Task& task) const {
    const int rows = int(task.last_pixel - task.first_pixel);
    const int64_t end = clamp(cut.vectors.begin(task.first_panel + task.panel_count) * kL, 0, a.K / a.groups);
    const bf16* x[kThinPairRows];
    bf16 *y[kThinPairRows], *y_vector[kThinPairRows];
    point(task.g, task.first_pixel, rows, x, y);
    for (int64_t k = cut.vectors.begin(task.first_panel) * kL; k < end; k += kL) {
      for (int m = 0; m < rows; ++m) y_vector[m] = y[m] + k;
      thin_pairs(rows, {x, filters(task.g, k, 0), a.w.k, cut.depth}, output(task.g, k, kL, y_vector));
    }
  }
};

}  // namespace

const char* pair_rows_reject(const Conv2dProblem& a) {
  if (a.R * a.S != 1) return "the filters are larger than 1x1";
  if (a.x.c != 1) return "reads pixels as runs of channels, and the channels of x are not contiguous (channels_last is)";
  if (a.y.c != 1) return "writes pixels as runs of filters, and the channels of y are not contiguous (channels_last is)";
  return nullptr;
}

double pair_rows_cost(const Conv2dProblem& a, const Machine& machine) {
  // pixel_rows' model at twice the peak: a tile's start takes as long as 24 products, packing as long as 16 pixels.
  const double filters = double(a.K / a.groups), vectors = double(round_up(a.K / a.groups, kL)) / kL;
  const double lanes = filters / (vectors * kL), depth = double(a.C / a.groups), start = depth / (depth + 24);
  const double wide = vectors >= 4 ? 1 : vectors >= 2 ? 0.9 : 0.7, pixels = double(a.N) * double(a.P) * double(a.Q);
  const double packing = pixels / (pixels + (a.w.k == 1 || a.frozen ? 4 : 16));
  return conv2d_flops(a) / (2 * peak_flops<float>(machine) * 0.92 * lanes * start * wide * packing);
}

int64_t pair_rows_workspace(const Conv2dProblem& a, const Machine& machine) {
  Arena arena(nullptr);
  const Scratch counted(arena, Cut(a, machine.threads));
  return arena.used() * machine.threads;
}

void pair_rows_run(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context) {
  const Cut cut(a, context.machine->threads);
  const int64_t panels = cut.vectors.parts, splits = cut.pixel_splits, pixels = a.N * a.P * a.Q;
  Arena counter(nullptr);
  const Scratch counted(counter, cut);
  parallel_ranges(context, a.groups * splits * panels, [&](int thread, int64_t begin, int64_t end) {
    Arena arena(static_cast<char*>(context.workspace) + thread * counter.used());
    const Scratch scratch(arena, cut);
    for (int64_t i = 0; i < 2 * cut.pairs; ++i) scratch.zeros[i] = bf16{0};
    const Call call{a, args, cut, scratch};
    for (int64_t i = begin; i < end;) {
      const int64_t panel = i % panels, split = i / panels % splits, g = i / panels / splits;
      int64_t count = panels - panel < end - i ? panels - panel : end - i;
      if (count > cut.panels_per_visit) count = cut.panels_per_visit;
      const Task task = {g, panel, count, pixels * split / splits, pixels * (split + 1) / splits};
      if (task.first_pixel < task.last_pixel) call.is_thin(task) ? call.run_thin(task) : call.run(task);
      i += count;
    }
  });
}

PackedFilters pair_rows_packed(const Conv2dProblem& a) {
  const Cut cut(a, 1);
  return {a.groups * cut.vectors.parts * cut.kept_size() * int64_t(sizeof(bf16)), 0};
}

void pair_rows_pack(const Conv2dProblem& a, const void* w, void* packed) {
  const Cut cut(a, 1);
  for (int64_t g = 0; g < a.groups; ++g) {
    for (int64_t panel = 0; panel < cut.vectors.parts; ++panel) {
      const int64_t k = cut.vectors.begin(panel) * kL;
      pack_pairs({static_cast<const bf16*>(w) + g * a.w.g + k * a.w.k, a.w.k, a.w.c, cut.depth}, a.K / a.groups - k,
                 cut.width(panel), static_cast<bf16*>(packed) + (g * cut.vectors.parts + panel) * cut.kept_size());
    }
  }
}

}  // namespace fastconv::FASTCONV_TARGET

#include "cpu/blocks/avx512_bf16/pair_gradient.h"

#include "cpu/blocks/avx512_bf16/pair_columns.h"
#include "cpu/blocks/avx512_bf16/pair_tile.h"
#include "cpu/blocks/bias_gradient.h"
#include "cpu/blocks/conv2d_geometry.h"
#include "cpu/blocks/parallel.h"
#include "cpu/blocks/split.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

constexpr int kL = kLanes<float>;

// Pairs of pixels between two visits to the sums, and filters whose pixels are packed at a time: 512 KB, half of an L2, beside
// 128 KB of a panel of 64 channels. Half of either is 5 to 20 % slower, where sums or pixels are met more often.
constexpr int64_t kMaxPairs = 512, kMaxFilters = 256;
// Pixels from packing x to its prefetch: 4096 pixels of 768 -> 768 went from 275 to 370 GFLOP/s.
constexpr int64_t kPixelsAhead = 32;

struct Cut {
  int64_t filters, channels, pixels;
  EvenSplit chunks;   // of the pairs of pixels
  EvenSplit vectors;  // of the channels of a group, cut into panels
  int64_t filter_splits, block_filters;

  FC_INLINE Cut(const Conv2dProblem& a, int threads)
      : filters(a.K / a.groups),
        channels(a.C / a.groups),
        pixels(a.N * a.P * a.Q),
        chunks((pixels + 1) / 2, kMaxPairs),
        vectors(round_up(channels, kL) / kL, GemmTile::kMaxVectors) {
    const int64_t tasks = a.groups * vectors.parts;
    filter_splits = tasks % threads == 0 || tasks >= 8 * threads ? 1 : threads;
    block_filters = filters < kMaxFilters ? filters : kMaxFilters;
  }
  FC_INLINE int64_t width(int64_t panel) const { return vectors.size(panel) * kL; }
  FC_INLINE int64_t row_width() const { return round_up(block_filters, kL); }
};

struct Scratch {
  bf16 *two, *rows;  // [pairs of a chunk][filters of a block][2]; of each tile of them [pairs of a chunk][filters][2]
  bf16* columns;     // [pairs of a chunk][channels of a panel][2]
  float* sums;       // [panel][filters of a block][width] where there are several chunks

  FC_INLINE Scratch(Arena& arena, const Cut& cut) {
    two = arena.take<bf16>(cut.chunks.largest() * cut.row_width() * 2 + 2 * kL);
    rows = arena.take<bf16>(cut.chunks.largest() * cut.row_width() * 2 + 2 * kL);
    columns = arena.take<bf16>(cut.chunks.largest() * GemmTile::kMaxVectors * kL * 2);
    sums = arena.take<float>(cut.chunks.parts > 1 ? cut.block_filters * cut.vectors.parts * GemmTile::kMaxVectors * kL : 0);
  }
};

// Filters k0 .. k1 of group g against panels first .. last of channels.
struct Task {
  int64_t g, k0, k1, first_panel, last_panel;
};

struct Call {
  const Conv2dProblem& a;
  const Conv2dArgs& args;
  const Cut& cut;
  const Scratch& scratch;

  // emit(pair, lower, upper) with what two pixels of a chunk have in x or in y, nullptr behind the last.
  template <class Emit>
  FC_INLINE void for_each_two(int64_t chunk, bool of_x, const Emit& emit) const {
    const int64_t begin = 2 * cut.chunks.begin(chunk);
    int64_t q = begin % a.Q, p = begin / a.Q % a.P, n = begin / a.Q / a.P, left = cut.pixels - begin;
    const auto next = [&]() -> const bf16* {
      if (left-- <= 0) return nullptr;
      const bf16* at = static_cast<const bf16*>(args.y) + n * a.y.n + p * a.y.h + q * a.y.w;
      if (of_x) {
        const int64_t h = p * a.stride_h - a.pad_top, w = q * a.stride_w - a.pad_left;
        const bool inside = uint64_t(h) < uint64_t(a.H) && uint64_t(w) < uint64_t(a.W);
        at = inside ? static_cast<const bf16*>(args.x) + n * a.x.n + h * a.x.h + w * a.x.w : nullptr;
      }
      if (++q == a.Q) {
        q = 0;
        if (++p == a.P) p = 0, ++n;
      }
      return at;
    };
    for (int64_t i = 0; i < cut.chunks.size(chunk); ++i) {
      const bf16* const lower = next();
      emit(i, lower, next());
    }
  }

  void run_block(const Task& task, int64_t k_block, int64_t count) const {
    const int64_t row = round_up(count, kL), first_channel = task.g * cut.channels;
    const EvenSplit tiles(count, GemmTile::rows(int(cut.vectors.largest())));
    for (int64_t chunk = 0; chunk < cut.chunks.parts; ++chunk) {
      const bool last = chunk == cut.chunks.parts - 1;
      const int64_t pairs = cut.chunks.size(chunk);
      const int64_t filter = task.g * cut.filters + k_block;
      for_each_two(chunk, false, [&](int64_t i, const bf16* lower, const bf16* upper) {
        interleave(lower + filter, upper ? upper + filter : nullptr, count, row, scratch.two + i * row * 2);
      });
      // Each tile's filters side by side, or every pair would be a line of the L2: whole vectors, each written over by the next.
      for (int64_t t = 0; t < tiles.parts; ++t) {
        const bf16* two = scratch.two + tiles.begin(t) * 2;
        bf16* to = scratch.rows + tiles.begin(t) * pairs * 2;
        for (int64_t i = 0; i < pairs; ++i, two += row * 2, to += tiles.size(t) * 2) {
          store(reinterpret_cast<float*>(to), load(reinterpret_cast<const float*>(two)));
        }
      }
      for (int64_t panel = task.first_panel; panel < task.last_panel; ++panel) {
        // A pixel's channels of a panel are two lines among those of all others.
        const int64_t pixel_step = a.Q > 1 ? a.x.w * a.stride_w : a.P > 1 ? a.x.h * a.stride_h : a.x.n;
        const int64_t ahead = kPixelsAhead * pixel_step;
        const int64_t width = cut.width(panel), c0 = cut.vectors.begin(panel) * kL, c = first_channel + c0;
        for_each_two(chunk, true, [&](int64_t i, const bf16* lower, const bf16* upper) {
          for (int64_t k = 0; lower && k < width; k += 2 * kL) {
            __builtin_prefetch(lower + c + ahead + k);
            __builtin_prefetch(lower + c + ahead + pixel_step + k);
          }
          interleave(lower ? lower + c : nullptr, upper ? upper + c : nullptr, cut.channels - c0, width,
                     scratch.columns + i * width * 2);
        });
        for (int64_t t = 0; t < tiles.parts; ++t) {
          const int rows = int(tiles.size(t));
          const bf16* from[GemmTile::kMaxRows];
          bf16* to[GemmTile::kMaxRows];
          for (int m = 0; m < rows; ++m) {
            from[m] = scratch.rows + (tiles.begin(t) * pairs + m) * 2;
            to[m] = static_cast<bf16*>(args.w) + task.g * a.w.g + (k_block + tiles.begin(t) + m) * a.w.k + c0;
          }
          float* const sums = scratch.sums + panel * cut.block_filters * GemmTile::kMaxVectors * kL + tiles.begin(t) * width;
          const int64_t left = cut.channels - c0;
          const PairOutput out = {chunk > 0 ? sums : nullptr,
                                  last ? nullptr : sums,
                                  to,
                                  int(left < width ? left : width),
                                  Activation::none,
                                  nullptr,
                                  nullptr,
                                  nullptr};
          pair_tile(rows, int(cut.vectors.size(panel)), {from, scratch.columns, width, pairs, kAheadInL2, 2 * rows}, out);
        }
      }
    }
  }

  void run(const Task& task) const {
    const EvenSplit blocks(task.k1 - task.k0, kMaxFilters);
    for (int64_t i = 0; i < blocks.parts; ++i) run_block(task, task.k0 + blocks.begin(i), blocks.size(i));
  }
};

}  // namespace

const char* pair_gradient_reject(const Conv2dProblem& a) {
  if (a.R * a.S != 1) return "the filters are larger than 1x1";
  if (a.x.c != 1 || a.y.c != 1)
    return "reads pixels as runs of channels, and those of x or y lie apart (in channels_last they do not)";
  if (a.w.c != 1) return "writes filters as runs of channels, and theirs are not contiguous";
  return nullptr;
}

double pair_gradient_cost(const Conv2dProblem& a, const Machine& machine) {
  // filter_gradient's model at twice the peak.
  const double filters = double(a.K / a.groups), channels = double(a.C / a.groups), pixels = double(a.N * a.P * a.Q);
  const double lanes = channels / double(round_up(a.C / a.groups, kL)), start = pixels / (pixels + 24);
  return conv2d_flops(a) / (2 * peak_flops<float>(machine) * 0.9 * lanes * start * filters / (filters + 4));
}

int64_t pair_gradient_workspace(const Conv2dProblem& a, const Machine& machine) {
  Arena arena(nullptr);
  const Scratch counted(arena, Cut(a, machine.threads));
  return arena.used() * machine.threads;
}

void pair_gradient_run(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context) {
  const Cut cut(a, context.machine->threads);
  const int64_t panels = cut.vectors.parts, splits = cut.filter_splits;
  Arena counter(nullptr);
  const Scratch counted(counter, cut);
  parallel_ranges(context, a.groups * splits * panels, [&](int thread, int64_t begin, int64_t end) {
    Arena arena(static_cast<char*>(context.workspace) + thread * counter.used());
    const Scratch scratch(arena, cut);
    const Call call{a, args, cut, scratch};
    for (int64_t i = begin; i < end;) {
      const int64_t panel = i % panels, split = i / panels % splits, g = i / panels / splits;
      const int64_t last = panels - panel < end - i ? panels : panel + end - i;
      const Task task = {g, cut.filters * split / splits, cut.filters * (split + 1) / splits, panel, last};
      if (task.k0 < task.k1) call.run(task);
      i += last - panel;
    }
  });
  if (a.epilogue.bias) bias_gradient<bf16>(a, args, context);
}

}  // namespace fastconv::FASTCONV_TARGET

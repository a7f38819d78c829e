#include "cpu/blocks/winograd.h"

#include "cpu/blocks/activation.h"
#include "cpu/blocks/ahead.h"
#include "cpu/blocks/conv2d_geometry.h"
#include "cpu/blocks/filter_panel.h"
#include "cpu/blocks/gemm_tile.h"
#include "cpu/blocks/parallel.h"
#include "cpu/blocks/split.h"
#include "cpu/blocks/winograd_windows.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// Transformed input and products of the tiles in work, which should stay in the L2 of one core: written to L3, a line of V took
// 20 to 50 cycles instead of 5. Fewer than kLeastTiles would have the filters stream from L3 faster than it gives them (12 FLOPs
// a byte), so many channels spill.
constexpr int64_t kTileBytes = 800 << 10, kLeastTiles = 24;
// Transformed filters that are kept, for all threads: they fit an L3. Where there are more, x is transformed once for each part.
constexpr int64_t kFilterBytes = 9 << 19;
// Channels of filters that are packed before they are transformed: a panel of 9 x 16 x 64 floats is 36 KB, of 7x7
// filters 196 KB.
constexpr int64_t kFilterChannels = 16;

// Cycles for one vector at one position of a tile, measured on Cascade Lake with x and y in memory, U in L3. Twice that on the
// sides whose channels are not contiguous.
struct TransformCycles {
  double input, filter, output;
};
template <class F>
constexpr TransformCycles kCycles = {};
template <>
constexpr TransformCycles kCycles<F<2, 3>> = {9, 16, 7};
template <>
constexpr TransformCycles kCycles<F<4, 3>> = {14, 15, 12};
template <>
constexpr TransformCycles kCycles<F<6, 3>> = {22, 15, 20};
template <>
constexpr TransformCycles kCycles<F<4, 5>> = kCycles<F<6, 3>>;  // the same windows of 8x8
template <>
constexpr TransformCycles kCycles<F<2, 7>> = kCycles<F<6, 3>>;
// The same for filters that were transformed before and come from memory.
constexpr double kKeptCycles = 12;
// The costs of im2col and implicit_gemm promise 0.9 of the FMA peak; with 5x5 and 7x7 filters these reach 0.4 to 0.7.
template <class F>
constexpr double kPromise = F::kTaps == 3   ? 1
                            : F::kTaps == 5 ? 0.7
                                            : 0.6;

// Sizes of what is kept, in elements: V is [position][tile][depth], U [panel][position][c][width], and the products
// [position][tile][width]. A vector between positions keeps them out of one another's cache sets.
template <class T, class F>
struct Blocking {
  static constexpr int64_t kL = kLanes<T>;
  EvenSplit vectors;                     // the filters of a group, in vectors, cut into panels
  EvenSplit blocks;                      // the tiles of the batch
  int64_t depth, width;                  // channels of a group in whole vectors; filters of the widest panel
  int64_t v_step, u_step, product_step;  // from one position to the next
  int64_t panels_kept;
  int64_t splits;  // of the panels, where there are too few blocks for the threads

  Blocking(const Conv2dProblem& a, int threads)
      : vectors((a.K / a.groups + kL - 1) / kL, GemmTile::kMaxVectors),
        blocks(Grid<F>(a).count, block_of(a, vectors.largest())),
        depth(round_up(a.C / a.groups, kL)),
        width(vectors.largest() * kL),
        v_step(blocks.largest() * depth + kL),
        u_step(a.C / a.groups * width + kL),
        product_step(blocks.largest() * width + kL),
        // Filters that meet one block only need not wait for another.
        panels_kept(blocks.parts == 1 ? (threads < vectors.parts ? threads : vectors.parts)
                                      : clamp(kFilterBytes / (F::kPositions * u_step * int64_t(sizeof(T))), 1, vectors.parts)),
        splits(blocks.parts % threads == 0 || blocks.parts >= 8 * threads ? 1 : threads) {}

  static int64_t block_of(const Conv2dProblem& a, int64_t widest) {
    constexpr int64_t rows = GemmTile::rows(GemmTile::kMaxVectors);
    const int64_t bytes = F::kPositions * (a.C / a.groups + widest * kL) * int64_t(sizeof(T));
    const int64_t fit = kTileBytes / bytes;
    return (fit > kLeastTiles ? fit : kLeastTiles) / rows * rows;
  }
  FC_INLINE int64_t panel_size() const { return F::kPositions * u_step; }
};

// Scratch of one thread.
template <class T, class F>
struct Scratch {
  T *v, *products;
  T* packed;      // [tap][c][width]
  T* strip;       // [row][pixel][lane]: pixels of one vector of channels or filters
  int64_t* held;  // the block of tiles that v holds, counted over all groups

  Scratch(Arena& arena, const Blocking<T, F>& blocking) {
    v = arena.take<T>(F::kPositions * blocking.v_step);
    products = arena.take<T>(F::kPositions * blocking.product_step);
    packed = arena.take<T>(F::kTaps * F::kTaps * kFilterChannels * blocking.width);
    strip = arena.take<T>(kStripElements<F, T>);
    held = arena.take<int64_t>(1);
  }
};

// --- transform: w to U

// One panel of `filters` filters, in `width` lanes.
template <class T, class F>
void transform_filters(const Conv2dProblem& a, const T* w, int64_t filters, int64_t width, int64_t u_step, T* packed, T* u) {
  constexpr int kInput = F::kInput, kTaps = F::kTaps, kL = kLanes<T>;
  const int64_t channels = a.C / a.groups;
  int64_t tap_offset[kTaps * kTaps];
  for (int t = 0; t < kTaps * kTaps; ++t) tap_offset[t] = t / kTaps * a.w.r + t % kTaps * a.w.s;
  for (int64_t c0 = 0; c0 < channels; c0 += kFilterChannels) {
    const int64_t count = channels - c0 < kFilterChannels ? channels - c0 : kFilterChannels;
    pack_filters<T>({w + c0 * a.w.c, a.w.k, a.w.c, tap_offset, kTaps * kTaps, count}, filters, width, packed);
    for (int64_t i = 0; i < count * width; i += kL) {
      vec<T> half[kInput][kTaps], line[kTaps], mapped[kInput];
      for (int s = 0; s < kTaps; ++s) {
#pragma GCC unroll 8
        for (int r = 0; r < kTaps; ++r) line[r] = load(packed + (r * kTaps + s) * count * width + i);
        winograd_filter<F>(line, mapped);
#pragma GCC unroll 8
        for (int h = 0; h < kInput; ++h) half[h][s] = mapped[h];
      }
      for (int h = 0; h < kInput; ++h) {
        winograd_filter<F>(half[h], mapped);
#pragma GCC unroll 8
        for (int j = 0; j < kInput; ++j) store(u + (h * kInput + j) * u_step + c0 * width + i, mapped[j]);
      }
    }
  }
}

// One panel of group g, from the filters of all groups.
template <class T, class F>
void transform_panel(const Conv2dProblem& a, const Blocking<T, F>& blocking, const T* w, int64_t g, int64_t panel, T* packed,
                     T* u) {
  const int64_t k = blocking.vectors.begin(panel) * kLanes<T>, width = blocking.vectors.size(panel) * kLanes<T>;
  transform_filters<T, F>(a, w + g * a.w.g + k * a.w.k, a.K / a.groups - k, width, blocking.u_step, packed, u);
}

// --- multiply: V·U to products, at every position

template <class T, class F>
void multiply(const Blocking<T, F>& blocking, const T* v, const T* u, int64_t channels, int64_t tiles, int vectors, T* products) {
  const int64_t width = vectors * kLanes<T>;
  const EvenSplit rows(tiles, GemmTile::rows(int(blocking.vectors.largest())));
  const ColumnPiece piece = {0, int32_t(width), 0, 1};
  for (int64_t position = 0; position < F::kPositions; ++position) {
    Ahead next(u + (position + 1) * blocking.u_step, channels * width);
    for (int64_t part = 0; part < rows.parts; ++part) {
      const T* a_rows[GemmTile::kMaxRows];
      T* y[GemmTile::kMaxRows];
      for (int64_t m = 0; m < rows.size(part); ++m) {
        a_rows[m] = v + position * blocking.v_step + (rows.begin(part) + m) * blocking.depth;
        y[m] = products + position * blocking.product_step + (rows.begin(part) + m) * width;
      }
      const TileInput<T> in = {a_rows, 1, u + position * blocking.u_step, width, 1, channels, nullptr, next.take(channels)};
      const TileOutput<T> out = {y, &piece, 1, false, false, Activation::none, nullptr, nullptr, nullptr, nullptr};
      gemm_tile(int(rows.size(part)), vectors, in, out);
    }
  }
}

// --- transform: products to y

// emit(row, column, vector of filters) for the outputs of one tile.
template <class T, class F, class Emit>
FC_INLINE void transform_output(const T* products, int64_t step, const Emit& emit) {
  constexpr int kInput = F::kInput, kOutput = F::kOutput;
  vec<T> half[kOutput][kInput], line[kInput], mapped[kOutput];
  for (int j = 0; j < kInput; ++j) {
#pragma GCC unroll 8
    for (int i = 0; i < kInput; ++i) line[i] = load(products + (i * kInput + j) * step);
    winograd_output<F>(line, mapped);
#pragma GCC unroll 8
    for (int i = 0; i < kOutput; ++i) half[i][j] = mapped[i];
  }
  for (int i = 0; i < kOutput; ++i) {
    winograd_output<F>(half[i], mapped);
#pragma GCC unroll 8
    for (int j = 0; j < kOutput; ++j) emit(i, j, mapped[j]);
  }
}

// Where the outputs of one vector of filters go.
template <class T>
struct Destination {
  T* y;               // of output (0, 0), filter 0 of the vector
  const T* bias;      // of that filter, or absent
  const T* residual;  // as y, or absent
  int lanes;
};

// One tile of channels-last y.
template <class T, class F>
void deliver_tile(const Conv2dProblem& a, const T* products, int64_t step, int64_t rows, int64_t pixels,
                  const Destination<T>& to) {
  const vec<T> bias = to.bias ? load(to.bias, to.lanes) : zero<T>();
  transform_output<T, F>(products, step, [&](int64_t i, int64_t j, vec<T> sum) {
    if (i >= rows || j >= pixels) return;
    const int64_t offset = i * a.y.h + j * a.y.w;
    __builtin_prefetch(to.y + offset + F::kOutput * a.y.w, 1);  // the next tile's
    if (to.bias) sum = sum + bias;
    if (to.residual) sum = sum + load(to.residual + offset, to.lanes);
    store(to.y + offset, activate(a.epilogue.activation, sum), to.lanes);
  });
}

// One strip of any other y: transposed, so that filters are rows of pixels.
template <class T, class F>
void deliver_transposed(const Conv2dProblem& a, const T* products, int64_t width, int64_t step, int64_t rows, int64_t pixels,
                        const Destination<T>& to, T* strip) {
  constexpr int64_t kOutput = F::kOutput, kL = kLanes<T>;
  const int64_t padded = round_up(pixels, kOutput);
  for (int64_t q = 0; q < pixels; q += kOutput, products += width) {
    transform_output<T, F>(products, step,
                           [&](int64_t i, int64_t j, vec<T> sum) { store(strip + (i * padded + q + j) * kL, sum); });
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t q = 0; q < pixels; q += kL) {
      const int n = pixels - q < kL ? int(pixels - q) : int(kL);
      vec<T> block[kL];
#pragma GCC unroll 16
      for (int m = 0; m < kL; ++m) block[m] = m < n ? load(strip + (i * padded + q + m) * kL) : zero<T>();
      transpose(block);
      for (int k = 0; k < to.lanes; ++k) {
        const int64_t offset = k * a.y.c + i * a.y.h + q * a.y.w;
        __builtin_prefetch(to.y + offset + kL * a.y.c, 1);
        vec<T> sum = block[k];
        if (to.bias) sum = sum + set1(to.bias[k]);
        if (to.residual) {
          sum = sum + (a.y.w == 1 ? load(to.residual + offset, n) : load_strided(to.residual + offset, a.y.w, n));
        }
        sum = activate(a.epilogue.activation, sum);
        a.y.w == 1 ? store(to.y + offset, sum, n) : store_strided(to.y + offset, a.y.w, sum, n);
      }
    }
  }
}

// Sizes and strides of one phase of y.
FC_INLINE Conv2dProblem outputs_of(const Conv2dProblem& whole, const DilationPhase& phase) {
  Conv2dProblem a = whole;
  a.P = rows_of_phase(whole.P, phase.i, whole.dilation_h);
  a.Q = rows_of_phase(whole.Q, phase.j, whole.dilation_w);
  a.y.h *= whole.dilation_h;
  a.y.w *= whole.dilation_w;
  return a;
}

// Tiles first .. first+tiles of the batch, filters k0 .. of the problem.
template <class T, class F>
void deliver(const Conv2dProblem& whole, const Conv2dArgs& args, const Blocking<T, F>& blocking, int64_t first, int64_t tiles,
             int64_t k0, int64_t filters, int64_t width, const Scratch<T, F>& scratch) {
  Grid<F>(whole).for_each_strip(first, first + tiles, [&](int64_t n, int64_t p, int64_t column, int64_t count, int64_t before) {
    const DilationPhase phase(n, whole.dilation_h, whole.dilation_w);
    const Conv2dProblem a = outputs_of(whole, phase);
    const int64_t start = phase.n * a.y.n + phase.i * whole.y.h + phase.j * whole.y.w;
    const auto destination = [&](int64_t q, int64_t k) -> Destination<T> {
      const int64_t offset = start + p * a.y.h + q * a.y.w + (k0 + k) * a.y.c;
      return {static_cast<T*>(args.y) + offset, a.epilogue.bias ? static_cast<const T*>(args.bias) + k0 + k : nullptr,
              a.epilogue.residual ? static_cast<const T*>(args.residual) + offset : nullptr,
              int(clamp(filters - k, 0, kLanes<T>))};
    };
    const int64_t q = column * F::kOutput, rows = clamp(a.P - p, 0, F::kOutput), pixels = a.Q - q;
    const T* products = scratch.products + before * width;
    if (a.y.c == 1) {
      for (int64_t t = 0; t < count; ++t) {
        for (int64_t k = 0; k < filters; k += kLanes<T>) {
          deliver_tile<T, F>(a, products + t * width + k, blocking.product_step, rows, pixels - t * F::kOutput,
                             destination(q + t * F::kOutput, k));
        }
      }
    } else {
      for (int64_t k = 0; k < filters; k += kLanes<T>) {
        deliver_transposed<T, F>(a, products + k, width, blocking.product_step, rows, clamp(pixels, 0, count * F::kOutput),
                                 destination(q, k), scratch.strip);
      }
    }
  });
}

}  // namespace

template <class F>
const char* winograd_reject(const Conv2dProblem& a) {
  if (a.R != F::kTaps || a.S != F::kTaps) {
    return F::kTaps == 3 ? "the filters are not 3x3" : F::kTaps == 5 ? "the filters are not 5x5" : "the filters are not 7x7";
  }
  if (a.stride_h != 1 || a.stride_w != 1) return "the stride is not 1";
  return nullptr;
}

template <class T, class F>
int64_t winograd_workspace(const Conv2dProblem& a, const Machine& machine) {
  const Blocking<T, F> blocking(a, machine.threads);
  Arena arena(nullptr), scratch(nullptr);
  arena.take<T>(blocking.panels_kept * blocking.panel_size());
  const Scratch<T, F> counted(scratch, blocking);
  return arena.used() + scratch.used() * machine.threads;
}

template <class T, class F>
void winograd_run(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context) {
  const Blocking<T, F> blocking(a, context.machine->threads);
  const int64_t channels = a.C / a.groups, filters = a.K / a.groups;
  Arena arena(context.workspace), counter(nullptr);
  T* own_u = arena.take<T>(blocking.panels_kept * blocking.panel_size());
  const Scratch<T, F> counted(counter, blocking);
  const auto scratch_of = [&](int64_t thread) {
    Arena own(static_cast<char*>(context.workspace) + arena.used() + thread * counter.used());
    return Scratch<T, F>(own, blocking);
  };
  const auto first_filter = [&](int64_t panel) { return blocking.vectors.begin(panel) * kLanes<T>; };
  const EvenSplit parts(blocking.vectors.parts, args.packed ? blocking.vectors.parts : blocking.panels_kept);
  for (int64_t thread = 0; thread < context.machine->threads; ++thread) *scratch_of(thread).held = -1;

  for (int64_t part = 0; part < a.groups * parts.parts; ++part) {
    const int64_t g = part / parts.parts, first_panel = parts.begin(part % parts.parts), panels = parts.size(part % parts.parts);
    const T* x = static_cast<const T*>(args.x) + g * channels * a.x.c;
    const T* u = static_cast<const T*>(args.packed) + g * panels * blocking.panel_size();
    if (!args.packed) {
      parallel_ranges(context, panels, [&](int thread, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          transform_panel<T, F>(a, blocking, static_cast<const T*>(args.w), g, first_panel + i, scratch_of(thread).packed,
                                own_u + i * blocking.panel_size());
        }
      });
      u = own_u;
    }
    parallel_ranges(context, blocking.blocks.parts * blocking.splits, [&](int thread, int64_t begin, int64_t end) {
      const Scratch<T, F> scratch = scratch_of(thread);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t block = task / blocking.splits, split = task % blocking.splits;
        const int64_t first = blocking.blocks.begin(block), tiles = blocking.blocks.size(block);
        const int64_t from = panels * split / blocking.splits, to = panels * (split + 1) / blocking.splits;
        if (from < to && *scratch.held != g * blocking.blocks.parts + block) {
          transform_windows<F, InputWindow<F>>({x, a.x, a.H, a.W, channels, a.pad_top, a.pad_left, a.dilation_h, a.dilation_w},
                                               Grid<F>(a), first, tiles, Positions<T>{scratch.v, blocking.v_step, blocking.depth},
                                               scratch.strip);
          *scratch.held = g * blocking.blocks.parts + block;
        }
        for (int64_t i = from; i < to; ++i) {
          const int64_t k = first_filter(first_panel + i), width = first_filter(first_panel + i + 1) - k;
          multiply<T, F>(blocking, scratch.v, u + i * blocking.panel_size(), channels, tiles, int(width / kLanes<T>),
                         scratch.products);
          deliver<T, F>(a, args, blocking, first, tiles, g * filters + k, filters - k < width ? filters - k : width, width,
                        scratch);
        }
      }
    });
  }
}

template <class T, class F>
PackedFilters winograd_packed(const Conv2dProblem& a) {
  const Blocking<T, F> blocking(a, 1);
  return {a.groups * blocking.vectors.parts * blocking.panel_size() * int64_t(sizeof(T)), 0};
}

template <class T, class F>
void winograd_pack(const Conv2dProblem& a, const void* w, void* packed) {
  const Blocking<T, F> blocking(a, 1);
  alignas(64) T taps[F::kTaps * F::kTaps * kFilterChannels * GemmTile::kMaxVectors * kLanes<T>];
  T* u = static_cast<T*>(packed);
  for (int64_t g = 0; g < a.groups; ++g) {
    for (int64_t panel = 0; panel < blocking.vectors.parts; ++panel, u += blocking.panel_size()) {
      transform_panel<T, F>(a, blocking, static_cast<const T*>(w), g, panel, taps, u);
    }
  }
}

// Cycles on one core, counted in vectors. The tile reaches 105 of 154 GFLOP/s on blocks of 42 tiles, 95 on 24, where filters
// stream from L3.
template <class T, class F>
double winograd_cost(const Conv2dProblem& a, const Machine& machine) {
  const Blocking<T, F> blocking(a, 1);
  constexpr TransformCycles cycles = kCycles<F>;
  const double tiles = double(Grid<F>(a).count), channels = double(a.C / a.groups), vectors = double(blocking.vectors.count);
  const double parts = blocking.blocks.parts == 1 ? 1 : double(EvenSplit(blocking.vectors.parts, blocking.panels_kept).parts);
  const double block = double(blocking.blocks.largest());
  const double multiply = tiles * channels * vectors / (2 * 0.78 * block / (block + 6));
  const double inputs = parts * tiles * double(blocking.depth / kLanes<T>) * cycles.input * (a.x.c == 1 ? 1 : 2);
  const double outputs = tiles * vectors * cycles.output * (a.y.c == 1 ? 1 : 2);
  const double all = multiply + inputs + outputs + channels * vectors * (a.frozen ? kKeptCycles : cycles.filter);
  return kPromise<F> * double(a.groups) * double(F::kPositions) * all / (3e9 * machine.threads);
}

#define FC_WINOGRAD(m, r)                                                                              \
  template const char* winograd_reject<F<m, r>>(const Conv2dProblem&);                                 \
  template int64_t winograd_workspace<float, F<m, r>>(const Conv2dProblem&, const Machine&);           \
  template void winograd_run<float, F<m, r>>(const Conv2dProblem&, const Conv2dArgs&, const Context&); \
  template PackedFilters winograd_packed<float, F<m, r>>(const Conv2dProblem&);                        \
  template void winograd_pack<float, F<m, r>>(const Conv2dProblem&, const void*, void*);               \
  template double winograd_cost<float, F<m, r>>(const Conv2dProblem&, const Machine&);
FC_WINOGRAD(2, 3)
FC_WINOGRAD(4, 3)
FC_WINOGRAD(6, 3)
FC_WINOGRAD(4, 5)
FC_WINOGRAD(2, 7)

}  // namespace fastconv::FASTCONV_TARGET

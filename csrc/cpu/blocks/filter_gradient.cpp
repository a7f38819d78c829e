#include "cpu/blocks/filter_gradient.h"

#include "cpu/blocks/ahead.h"
#include "cpu/blocks/bias_gradient.h"
#include "cpu/blocks/columns.h"
#include "cpu/blocks/conv2d_geometry.h"
#include "cpu/blocks/gemm_tile.h"
#include "cpu/blocks/load_pixels.h"
#include "cpu/blocks/parallel.h"
#include "cpu/blocks/split.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// Pixels between two visits to the sums. 512 pixels x 64 channels of floats are 128 KB; a visit then costs 48 of 6144 cycles'
// worth of loads and stores.
constexpr int64_t kMaxPixels = 512;
// And where the sums are in L2 anyway: half the packed pixels leave room for those fetched ahead.
constexpr int64_t kMaxPixelsAhead = 256;
constexpr int64_t kMaxSumsAhead = 512 * 1024;  // bytes
// Filters whose packed pixels are kept at a time: 512 x 256 floats are 512 KB, half of an L2.
constexpr int64_t kMaxFilters = 256;

// Pixels from the packing of x to its prefetch: a pixel's columns are a few lines among many that other panels take.
constexpr int64_t kPixelsAhead = 8;
constexpr int64_t kRowsAhead = 2;  // the same for y, whose runs are longer

// Linear's rows are images of one pixel: as one image of many pixels they are walked without a step between samples.
Conv2dProblem flatten(Conv2dProblem a) {
  if (a.R * a.S == 1 && a.H * a.W == 1 && a.P * a.Q == 1 && a.pad_top == 0 && a.pad_left == 0) {
    a.x.w = a.x.n, a.y.w = a.y.n;
    a.W = a.Q = a.N;
    a.N = a.stride_w = 1;
  }
  return a;
}

// The pixels of one chunk: `pixels` of the flat P*Q plane from `first` on, of `samples` samples from n on.
struct Chunk {
  int64_t n, samples, first, pixels;
};

struct Chunks {
  EvenSplit parts, samples;  // large planes are cut, small ones are taken several samples at a time

  FC_INLINE Chunks(const Conv2dProblem& a, int64_t pixels)
      : parts(a.P * a.Q, pixels), samples(a.N, a.P * a.Q >= pixels ? 1 : pixels / (a.P * a.Q)) {}
  template <class T>
  static Chunks of(const Conv2dProblem& a) {
    const int64_t sums = a.K * a.R * a.S * (a.C / a.groups) * int64_t(sizeof(T));
    return {a, a.P * a.Q > kMaxPixels && sums <= kMaxSumsAhead ? kMaxPixelsAhead : kMaxPixels};
  }
  FC_INLINE int64_t count() const { return parts.parts * samples.parts; }
  FC_INLINE int64_t largest() const { return parts.largest() * samples.largest(); }
  FC_INLINE Chunk at(int64_t i) const {
    const int64_t s = i / parts.parts, part = i % parts.parts;
    return {samples.begin(s), samples.size(s), parts.begin(part), parts.size(part)};
  }
};

// visit(n, p, q, length, pixels before) for every stretch of a chunk within one output row.
template <class Visit>
FC_INLINE void for_each_stretch(const Conv2dProblem& a, const Chunk& chunk, const Visit& visit) {
  for (int64_t sample = 0; sample < chunk.samples; ++sample) {
    int64_t p = chunk.first / a.Q, q = chunk.first % a.Q;
    for (int64_t done = 0; done < chunk.pixels;) {
      const int64_t left = chunk.pixels - done, length = a.Q - q < left ? a.Q - q : left;
      visit(chunk.n + sample, p, q, length, sample * chunk.pixels + done);
      done += length;
      q = 0, ++p;
    }
  }
}

// --- the rows: y, as [pixel][filters of a block], or in place where a plane of NCHW is one run of pixels

FC_INLINE bool rows_in_place(const Conv2dProblem& a) { return a.y.w == 1 && a.y.h == a.Q; }

// Elements from one pixel to the next: an odd number of lines puts neighbours into different cache sets. Where K is a power of
// two and y were read in place, all pixels of a tile would meet in one. (A panel for each tile would feed it at 142 GFLOP/s
// instead of 107, but writing 43 of them in turn takes 2 cycles an element, and up to four panels of columns use it.)
template <class T>
FC_INLINE int64_t row_step(int64_t filters) {
  return round_up(filters, 2 * kLanes<T>) + kLanes<T>;
}

template <class T>
void pack_rows(const Conv2dProblem& a, const Chunk& chunk, const T* y, int64_t filters, T* panel) {
  const int64_t step = row_step<T>(filters);
  for_each_stretch(a, chunk, [&](int64_t n, int64_t p, int64_t q, int64_t length, int64_t before) {
    const T* from = y + n * a.y.n + p * a.y.h + q * a.y.w;
    T* to = panel + before * step;
    for (int64_t i = 0; i < length; ++i, from += a.y.w, to += step) {
      if (a.y.c == 1) {
        for (int64_t k = 0; k < filters; k += kLanes<T>) {
          __builtin_prefetch(from + k + kRowsAhead * a.y.w);
          store(to + k, load(from + k, int(clamp(filters - k, 0, kLanes<T>))));
        }
      } else {
        for (int64_t k = 0; k < filters; ++k) to[k] = from[k * a.y.c];
      }
    }
  });
}

// --- the columns: x under one tap, as [pixel][width]

// A "tap" is one filter position and its columns are channels, unless a vector of channels would be mostly empty: then a tap is
// one filter row and its columns are (s, c). A stem of three channels fills 21 of 32 lanes that way, not 3 of 16.
struct Columns {
  bool whole_rows;
  int64_t taps, count;  // columns of one tap

  template <class T>
  static Columns of(const Conv2dProblem& a) {
    const int64_t channels = a.C / a.groups;
    const bool one_run = a.x.c != 1 || (a.x.w == a.C && a.dilation_w == 1 && a.groups == 1);
    const bool whole_rows = a.S > 1 && channels < kLanes<T> && one_run;
    return {whole_rows, whole_rows ? a.R : a.R * a.S, whole_rows ? a.S * channels : channels};
  }
  // The columns of a tap, in vectors, cut into panels.
  template <class T>
  EvenSplit vectors() const {
    return {(count + kLanes<T> - 1) / kLanes<T>, GemmTile::kMaxVectors};
  }
};

// Columns first .. first+count of tap (r, s), where s is 0 for whole rows.
struct ColumnPart {
  bool whole_rows;
  int64_t r, s, first, count, width;
};

// One stretch of pixels of channels-last x: a pixel's columns are one run of memory.
template <class T>
void pack_runs(const Conv2dProblem& a, const ColumnPart& part, const T* x_row, int64_t q, int64_t length, const Range* inside,
               T* to) {
  constexpr int kL = kLanes<T>;
  const int64_t step = a.stride_w * a.x.w, channels = a.C / a.groups;
  const T* from = x_row + (q * a.stride_w - a.pad_left + part.s * a.dilation_w) * a.x.w + part.first;
  for (int64_t i = 0; i < length; ++i, from += step, to += part.width) {
    int64_t lo = 0, hi = part.count;
    if (part.whole_rows) {
      const int64_t left = (q + i) * a.stride_w - a.pad_left;
      lo = clamp(-left, 0, a.S) * channels - part.first;
      hi = clamp(a.W - left, 0, a.S) * channels - part.first;
      hi = hi < part.count ? hi : part.count;
    } else if (q + i < inside[part.s].begin || q + i >= inside[part.s].end) {
      hi = 0;
    }
    for (int64_t c = 0; c < part.width; c += kL) {
      __builtin_prefetch(from + c + kPixelsAhead * step);
      store(to + c, lo <= c && c + kL <= hi ? load(from + c)
                                            : load_range(from + c, int(clamp(lo - c, 0, kL)), int(clamp(hi - c, 0, kL))));
    }
  }
}

// One stretch of pixels of any other x: a column's pixels are evenly spaced. Blocks of them are transposed in registers.
template <class T>
void pack_transposed(const Conv2dProblem& a, const ColumnPart& part, const T* x_row, int64_t q, int64_t length,
                     const Range* inside, T* to) {
  constexpr int kL = kLanes<T>;
  const int64_t step = a.stride_w * a.x.w, channels = a.C / a.groups;
  for (int64_t c = 0; c < part.width; c += kL) {
    const T* from[kL];  // where each column's pixel q = 0 would be
    Range pixels[kL];
    for (int lane = 0; lane < kL; ++lane) {
      const int64_t column = part.first + c + lane;
      const int64_t s = part.whole_rows ? column / channels : part.s, channel = part.whole_rows ? column % channels : column;
      const bool exists = c + lane < part.count;
      pixels[lane] = exists ? inside[s] : Range{0, 0};
      from[lane] = exists ? x_row + channel * a.x.c + (s * a.dilation_w - a.pad_left) * a.x.w : x_row;
    }
    for (int64_t i = 0; i < length; i += kL) {
      const int n = length - i < kL ? int(length - i) : kL;
      vec<T> block[kL];
#pragma GCC unroll 16
      for (int lane = 0; lane < kL; ++lane) {
        const int lo = int(clamp(pixels[lane].begin - q - i, 0, n)), hi = int(clamp(pixels[lane].end - q - i, lo, n));
        block[lane] = load_pixels(from[lane] + (q + i) * step, step, lo, hi);
      }
      transpose(block);
      for (int m = 0; m < n; ++m) store(to + (i + m) * part.width + c, block[m]);
    }
  }
}

template <class T>
void pack_columns(const Conv2dProblem& a, const Chunk& chunk, const ColumnPart& part, const T* x, const Range* inside, T* panel) {
  for_each_stretch(a, chunk, [&](int64_t n, int64_t p, int64_t q, int64_t length, int64_t before) {
    T* to = panel + before * part.width;
    const int64_t h = p * a.stride_h - a.pad_top + part.r * a.dilation_h;
    if (uint64_t(h) >= uint64_t(a.H)) {
      for (int64_t i = 0; i < length * part.width; i += kLanes<T>) store(to + i, zero<T>());
      return;
    }
    const T* x_row = x + n * a.x.n + h * a.x.h;
    a.x.c == 1 ? pack_runs(a, part, x_row, q, length, inside, to) : pack_transposed(a, part, x_row, q, length, inside, to);
  });
}

// --- the pixels of a chunk, channels last and without gaps between rows, to be fetched before they are packed

template <class T>
Ahead ahead(const T* first, const Stride4& strides, int64_t columns, const Chunk& chunk) {
  if (strides.c != 1 || strides.h != columns * strides.w || chunk.samples != 1) return {};
  return {first + chunk.n * strides.n + chunk.first * strides.w, chunk.pixels * strides.w};
}

// --- the sums: in w itself where a filter's channels are contiguous, else in [k][tap][c] of the workspace

template <class T>
bool sums_in_place(const Conv2dProblem& a) {
  return a.w.c == 1 && (!Columns::of<T>(a).whole_rows || a.w.s == a.C / a.groups);
}

template <class T>
int64_t sums_bytes(const Conv2dProblem& a) {
  return sums_in_place<T>(a) ? 0 : round_up(a.K * a.R * a.S * (a.C / a.groups) * int64_t(sizeof(T)), 64);
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

template <class T>
struct Scratch {
  T* rows;             // [pixel][filters of a block]
  T* columns;          // [pixel][width]
  const T** pointers;  // [samples of a chunk][rows of the tile]
  Range* inside;       // [S]: the outputs whose input column lies inside

  Scratch(Arena& arena, const Conv2dProblem& a, const Chunks& chunks) {
    const int64_t filters = a.K / a.groups < kMaxFilters ? a.K / a.groups : kMaxFilters;
    rows = arena.take<T>(rows_in_place(a) ? 0 : row_step<T>(filters) * chunks.largest());
    columns = arena.take<T>(chunks.largest() * GemmTile::kMaxVectors * kLanes<T>);
    pointers = arena.take<const T*>(chunks.samples.largest() * GemmTile::kMaxRows);
    inside = arena.take<Range>(a.S);
    for (int64_t s = 0; inside && s < a.S; ++s) {
      inside[s] = outputs_inside(a.Q, a.stride_w, s * a.dilation_w - a.pad_left, a.W);
    }
  }
};

// Filters k0 .. k1 of group g against panels first .. last of columns.
struct Task {
  int64_t g, k0, k1, first_panel, last_panel;
};

template <class T>
void run_task(const Conv2dProblem& a, const Conv2dArgs& args, const Task& task, const Shares& shares, const Chunks& chunks,
              T* sums, const WeightStride& step, const Scratch<T>& scratch) {
  const int64_t channels = a.C / a.groups, filters = a.K / a.groups;
  const EvenSplit blocks(task.k1 - task.k0, kMaxFilters);
  for (int64_t block = 0; block < blocks.parts; ++block) {
    const int64_t k_block = task.k0 + blocks.begin(block), count = blocks.size(block);
    for (int64_t i = 0; i < chunks.count(); ++i) {
      const Chunk chunk = chunks.at(i);
      const int64_t pixels = chunk.samples * chunk.pixels;
      // The tiles of all panels have the same rows, so that the packed rows serve them all.
      const EvenSplit tiles(count, GemmTile::rows(int(shares.vectors.largest())));
      const T* y = static_cast<const T*>(args.y) + (task.g * filters + k_block) * a.y.c;
      const T* x = static_cast<const T*>(args.x) + task.g * channels * a.x.c;
      if (!rows_in_place(a)) pack_rows(a, chunk, y, count, scratch.rows);
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
            const int64_t k = k_block + tiles.begin(tile) + m;
            w[m] = sums + task.g * step.g + k * step.k + c0 + r * step.r + s * step.s;
            if (rows_in_place(a)) {
              for (int64_t n = 0; n < chunk.samples; ++n) {
                a_rows[n * rows + m] = y + (tiles.begin(tile) + m) * a.y.c + (chunk.n + n) * a.y.n + chunk.first;
              }
            } else {
              a_rows[m] = scratch.rows + tiles.begin(tile) + m;
            }
          }
          TileInput<T> in = rows_in_place(a) ? TileInput<T>{a_rows, 1, scratch.columns, width, chunk.samples, chunk.pixels}
                                             : TileInput<T>{a_rows, row_step<T>(count), scratch.columns, width, 1, pixels};
          const TileOutput<T> out = {w, &piece, 1, i > 0, false, Activation::none, nullptr, nullptr, nullptr, nullptr};
          in.next = next_y.take(pixels);
          if (!in.next) in.next = next_x.take(pixels);
          gemm_tile(rows, vectors, in, out);
        }
      }
    }
  }
}

}  // namespace

template <class T>
int64_t filter_gradient_workspace(const Conv2dProblem& problem, const Machine& machine) {
  const Conv2dProblem a = flatten(problem);
  Arena arena(nullptr);
  const Scratch<T> counted(arena, a, Chunks::of<T>(a));
  return arena.used() * machine.threads + sums_bytes<T>(a);
}

template <class T>
void filter_gradient_run(const Conv2dProblem& problem, const Conv2dArgs& args, const Context& context) {
  const Conv2dProblem a = flatten(problem);
  const Chunks chunks = Chunks::of<T>(a);
  const Shares shares = Shares::of<T>(a, context.machine->threads);
  const int64_t filters = a.K / a.groups, channels = a.C / a.groups, plane = a.R * a.S;
  T* w = static_cast<T*>(args.w);
  T* sums = sums_in_place<T>(a) ? w : static_cast<T*>(context.workspace);
  const WeightStride step =
      sums_in_place<T>(a) ? a.w : WeightStride{filters * plane * channels, plane * channels, 1, a.S * channels, channels};
  char* scratch_base = static_cast<char*>(context.workspace) + sums_bytes<T>(a);
  Arena counter(nullptr);
  const Scratch<T> counted(counter, a, chunks);

  parallel_ranges(context, a.groups * shares.filter_splits * shares.panels, [&](int thread, int64_t begin, int64_t end) {
    Arena arena(scratch_base + thread * counter.used());
    const Scratch<T> scratch(arena, a, chunks);
    for (int64_t i = begin; i < end;) {
      const int64_t panel = i % shares.panels, split = i / shares.panels % shares.filter_splits;
      const int64_t g = i / shares.panels / shares.filter_splits;
      const int64_t last = shares.panels - panel < end - i ? shares.panels : panel + end - i;
      const int64_t k0 = filters * split / shares.filter_splits, k1 = filters * (split + 1) / shares.filter_splits;
      if (k0 < k1) run_task(a, args, {g, k0, k1, panel, last}, shares, chunks, sums, step, scratch);
      i += last - panel;
    }
  });
  if (!sums_in_place<T>(a)) deliver(a, sums, w, context);
  if (a.epilogue.bias) bias_gradient<T>(a, args, context);
}

template <class T>
double filter_gradient_efficiency(const Conv2dProblem& problem) {
  const Conv2dProblem a = flatten(problem);
  const double filters = double(a.K / a.groups);
  const int64_t columns = Columns::of<T>(a).count;
  const double lanes = double(columns) / double(round_up(columns, kLanes<T>));
  const double pixels = double(Chunks::of<T>(a).largest());
  const double start = pixels / (pixels + 12);  // a tile's prologue and stores take about as long as twelve steps
  const double pack = a.x.c == 1 ? 4 : 12;      // a packed pixel costs as much as its use by so many filters
  return 0.9 * lanes * start * filters / (filters + pack);
}

template int64_t filter_gradient_workspace<float>(const Conv2dProblem&, const Machine&);
template int64_t filter_gradient_workspace<double>(const Conv2dProblem&, const Machine&);
template void filter_gradient_run<float>(const Conv2dProblem&, const Conv2dArgs&, const Context&);
template void filter_gradient_run<double>(const Conv2dProblem&, const Conv2dArgs&, const Context&);
template double filter_gradient_efficiency<float>(const Conv2dProblem&);
template double filter_gradient_efficiency<double>(const Conv2dProblem&);

}  // namespace fastconv::FASTCONV_TARGET

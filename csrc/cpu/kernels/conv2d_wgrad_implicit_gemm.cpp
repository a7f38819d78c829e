// conv2d_wgrad.implicit_gemm: the gradient of the filters as a matrix multiplication that sums over output pixels, in which x is
// packed once and not once for each tap: the rows of its tiles are filter elements, each one pointer into planes of x,
//
//   sums[(c, r, s)][k] = sum over output rows t, columns q of  x[c][row of t + r][q + s] * y[t][q][k]
//
// Takes every problem, in either layout. A row reads pixel after pixel of one plane, a line for sixteen of them; channels last,
// where every pixel is a line of its own, the copy that makes planes costs less than that (94 to 112 GFLOP/s on 128 channels).
//
//   tile       blocks/gemm_tile.h   6 filter elements x 64 filters in registers (AVX-512), 4 x 24 (AVX2)
//   transform  a chunk of at most 512 pixels at a time, in L2: y as [pixel][64 filters], x as padded planes or where it lies
//   multiply   blocks/gemm_tile.cpp
//   run        blocks of filters, then chunks of pixels, then blocks of channels
#include "cpu/blocks/bias_gradient.h"
#include "cpu/blocks/columns.h"
#include "cpu/blocks/conv2d_geometry.h"
#include "cpu/blocks/gemm_tile.h"
#include "cpu/blocks/parallel.h"
#include "cpu/blocks/split.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- tile: blocks/gemm_tile. Its taps are output rows, its depth the pixels of one.

// Pixels between two visits to the sums: a visit costs 48 of 6144 cycles' worth of loads and stores.
constexpr int64_t kMaxPixels = 512;
// Filters whose packed pixels are kept at a time: 512 x 256 floats are 512 KB, half of an L2.
constexpr int64_t kMaxFilters = 256;
// Elements of x that are copied at a time, with their padding: 256 KB of floats.
constexpr int64_t kMaxStaged = 64 * 1024;

// Images without padding under 1x1 filters are one row of pixels.
Conv2dProblem flatten(Conv2dProblem a) {
  if (a.R * a.S * a.stride_h * a.stride_w != 1 || a.pad_top != 0 || a.pad_left != 0 || a.P != a.H || a.Q != a.W) return a;
  if (a.x.h == a.W * a.x.w && a.y.h == a.Q * a.y.w) a.W *= a.H, a.Q *= a.P, a.H = a.P = 1;
  if (a.W == 1) a.x.w = a.x.n, a.y.w = a.y.n, a.W = a.Q = a.N, a.N = 1;
  return a;
}

// A stretch of columns of some output rows, of one sample or of several whole ones.
struct Chunk {
  int64_t n, samples, p, rows, q, columns;
  FC_INLINE int64_t taps() const { return samples * rows; }
  FC_INLINE int64_t pixels() const { return samples * rows * columns; }
};

struct Chunks {
  EvenSplit samples, rows, columns;
  FC_INLINE explicit Chunks(const Conv2dProblem& a)
      : samples(a.N, a.P * a.Q >= kMaxPixels ? 1 : kMaxPixels / (a.P * a.Q)),
        rows(a.P, a.Q >= kMaxPixels ? 1 : kMaxPixels / a.Q),
        columns(a.Q, kMaxPixels) {}
  FC_INLINE int64_t count() const { return samples.parts * rows.parts * columns.parts; }
  FC_INLINE Chunk largest() const { return {0, samples.largest(), 0, rows.largest(), 0, columns.largest()}; }
  FC_INLINE Chunk at(int64_t i) const {
    const int64_t s = i / columns.parts / rows.parts, row = i / columns.parts % rows.parts, column = i % columns.parts;
    return {samples.begin(s), samples.size(s), rows.begin(row), rows.size(row), columns.begin(column), columns.size(column)};
  }
};

// --- transform: y as [pixel][width], a panel for every `width` filters

template <class T>
void pack_pixels(const Conv2dProblem& a, const Chunk& chunk, const T* y, int64_t filters, int64_t width, T* panel) {
  constexpr int kL = kLanes<T>;
  const bool whole_rows = chunk.columns == a.Q && a.y.h == a.Q * a.y.w;
  const int64_t runs = whole_rows ? 1 : chunk.rows, length = whole_rows ? chunk.rows * chunk.columns : chunk.columns;
  for (int64_t sample = 0; sample < chunk.samples; ++sample) {
    for (int64_t run = 0; run < runs; ++run, panel += length * width) {
      const T* from = y + (chunk.n + sample) * a.y.n + (chunk.p + run) * a.y.h + chunk.q * a.y.w;
      for (int64_t k = 0; k < width; k += kL) {
        const int lanes = int(clamp(filters - k, 0, kL));
        if (a.y.w == 1 && a.y.c != 1) {
          for_each_column(from + k * a.y.c, a.y.c, lanes, length,
                          [&](int64_t i, vec<T> column) { store(panel + i * width + k, column); });
        } else {
          for (int64_t i = 0; i < length; ++i) {
            const T* pixel = from + i * a.y.w + k * a.y.c;
            store(panel + i * width + k, a.y.c == 1 ? load(pixel, lanes) : load_strided(pixel, a.y.c, lanes));
          }
        }
      }
    }
  }
}

// --- transform: x as planes, where it lies or, channels last and where filters reach into the padding, in a copy

// Strides of the planes that the tiles read, whose pixels are neighbours.
struct Planes {
  int64_t n, c, h;
};

FC_INLINE bool in_place(const Conv2dProblem& a) {
  const int64_t last_h = (a.P - 1) * a.stride_h + (a.R - 1) * a.dilation_h - a.pad_top;
  const int64_t last_w = (a.Q - 1) * a.stride_w + (a.S - 1) * a.dilation_w - a.pad_left;
  return a.x.w == 1 && a.pad_top <= 0 && a.pad_left <= 0 && last_h < a.H && last_w < a.W;
}

// The rows and columns of one sample that a chunk reads.
struct Window {
  int64_t height, width;
};

FC_INLINE Window window(const Conv2dProblem& a, const Chunk& chunk) {
  return {(chunk.rows - 1) * a.stride_h + (a.R - 1) * a.dilation_h + 1,
          (chunk.columns - 1) * a.stride_w + (a.S - 1) * a.dilation_w + 1};
}

template <class T>
FC_INLINE Planes planes(const Conv2dProblem& a, const Chunk& largest) {
  if (in_place(a)) return {a.x.n, a.x.c, a.x.h};
  const Window size = window(a, largest);
  const int64_t n = size.height * size.width;
  // An odd number of lines from channel to channel, so that sixteen are not in one cache set.
  return {n, round_up(largest.samples * n, 2 * kLanes<T>) + kLanes<T>, size.width};
}

// Channels that are copied at a time.
template <class T>
FC_INLINE int64_t staged_channels(const Conv2dProblem& a, const Chunk& largest) {
  return in_place(a) ? a.C / a.groups : clamp(kMaxStaged / planes<T>(a, largest).c, 1, a.C / a.groups);
}

template <class T>
FC_INLINE void clear(T* to, int64_t count) {
  constexpr int kL = kLanes<T>;
  for (int64_t i = 0; i < count; i += kL) store(to + i, zero<T>(), int(clamp(count - i, 0, kL)));
}

// The window of a chunk, of `channels` channels from x on.
template <class T>
void copy_window(const Conv2dProblem& a, const Chunk& chunk, const T* x, int64_t channels, const Planes& at, T* to) {
  constexpr int kL = kLanes<T>;
  const Window size = window(a, chunk);
  const int64_t h0 = chunk.p * a.stride_h - a.pad_top, w0 = chunk.q * a.stride_w - a.pad_left;
  const int64_t begin = clamp(-w0, 0, size.width), end = clamp(a.W - w0, begin, size.width);
  for (int64_t sample = 0; sample < chunk.samples; ++sample) {
    for (int64_t i = 0; i < size.height; ++i) {
      T* row = to + sample * at.n + i * at.h;
      if (uint64_t(h0 + i) >= uint64_t(a.H)) {
        for (int64_t c = 0; c < channels; ++c) clear(row + c * at.c, size.width);
        continue;
      }
      const T* from = x + (chunk.n + sample) * a.x.n + (h0 + i) * a.x.h + w0 * a.x.w;
      if (begin > 0 || end < size.width) {
        for (int64_t c = 0; c < channels; ++c) {
          clear(row + c * at.c, begin);
          clear(row + c * at.c + end, size.width - end);
        }
      }
      for (int64_t j = begin; j < end; j += kL) {
        const int lanes = int(clamp(end - j, 0, kL));
        const T* pixels = from + j * a.x.w;
        T* out = row + j;
        if (a.x.c == 1 && channels >= kL) {
          for_each_block(pixels, a.x.w, lanes, channels, [&](int64_t c, int n, const vec<T>(&block)[kL]) {
            for (int m = 0; m < n; ++m) store(out + (c + m) * at.c, block[m], lanes);
          });
        } else {
          for (int64_t c = 0; c < channels; ++c) {
            const T* plane = pixels + c * a.x.c;
            store(out + c * at.c, a.x.w == 1 ? load(plane, lanes) : load_strided(plane, a.x.w, lanes), lanes);
          }
        }
      }
    }
  }
}

// --- multiply: blocks/gemm_tile. The order of the filter elements in the sums is that in w, if there is one.

struct Element {
  int64_t c, r, s;
};

FC_INLINE Element element(const Conv2dProblem& a, int64_t row) {
  const int64_t channels = a.C / a.groups;
  if (a.w.c == 1) return {row % channels, row / channels / a.S, row / channels % a.S};
  return {row / a.S / a.R, row / a.S % a.R, row % a.S};
}

template <class T>
int64_t sums_step(const Conv2dProblem& a) {
  return round_up(a.K / a.groups, kLanes<T>);
}

template <class T>
int64_t sums_bytes(const Conv2dProblem& a) {
  return round_up(a.C * a.R * a.S * sums_step<T>(a) * int64_t(sizeof(T)), 64);
}

// The sums into w: blocks of filter elements x filters are transposed in registers.
template <class T>
void deliver(const Conv2dProblem& a, const T* sums, T* w, const Context& context) {
  constexpr int kL = kLanes<T>;
  const int64_t channels = a.C / a.groups, filters = a.K / a.groups, rows = channels * a.R * a.S, step = sums_step<T>(a);
  const bool dense = a.w.c == 1 ? (a.S == 1 || a.w.s == channels) && (a.R == 1 || a.w.r == a.S * channels)
                                : (a.S == 1 || a.w.s == 1) && (a.R == 1 || a.w.r == a.S) && (channels == 1 || a.w.c == a.R * a.S);
  const int64_t blocks = step / kL;
  parallel_ranges(context, a.groups * blocks, [&](int, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t g = i / blocks, k = i % blocks * kL;
      const int count = int(clamp(filters - k, 0, kL));
      T* to = w + g * a.w.g + k * a.w.k;
      for (int64_t row = 0; row < rows; row += kL) {
        const int lanes = int(clamp(rows - row, 0, kL));
        vec<T> block[kL];
#pragma GCC unroll 16
        for (int m = 0; m < kL; ++m) block[m] = m < lanes ? load(sums + (g * rows + row + m) * step + k) : zero<T>();
        transpose(block);
        if (dense) {
          for (int m = 0; m < count; ++m) store(to + m * a.w.k + row, block[m], lanes);
          continue;
        }
        for (int lane = 0; lane < lanes; ++lane) {
          const Element e = element(a, row + lane);
          for (int m = 0; m < count; ++m) to[m * a.w.k + e.c * a.w.c + e.r * a.w.r + e.s * a.w.s] = block[m].v[lane];
        }
      }
    }
  });
}

// --- run

template <class T>
struct Scratch {
  T* pixels;      // [panels of filters][pixel][width]
  T* window;      // the copy of x
  int64_t* taps;  // where each output row of a chunk starts

  Scratch(Arena& arena, const Conv2dProblem& a, const Chunk& largest) {
    const int64_t step = sums_step<T>(a), filters = step < kMaxFilters ? step : kMaxFilters;
    pixels = arena.take<T>(largest.pixels() * filters);
    window = arena.take<T>(in_place(a) ? 0 : staged_channels<T>(a, largest) * planes<T>(a, largest).c);
    taps = arena.take<int64_t>(largest.taps());
  }
};

// Of group g: vectors first .. last of the filters against channels c0 .. c1.
struct Task {
  int64_t g, first, last, c0, c1;
};

template <class T>
void run_task(const Conv2dProblem& a, const Conv2dArgs& args, const Task& task, const Chunks& chunks, T* sums,
              const Scratch<T>& scratch) {
  constexpr int kL = kLanes<T>;
  const int64_t channels = a.C / a.groups, filters = a.K / a.groups, step = sums_step<T>(a), plane = a.R * a.S;
  const Chunk largest = chunks.largest();
  const Planes at = planes<T>(a, largest);
  const EvenSplit blocks(task.last - task.first, kMaxFilters / kL);
  const EvenSplit channel_blocks(task.c1 - task.c0, staged_channels<T>(a, largest));
  for (int64_t block = 0; block < blocks.parts; ++block) {
    const EvenSplit panels(blocks.size(block), GemmTile::kMaxVectors);
    const int64_t k0 = (task.first + blocks.begin(block)) * kL;
    for (int64_t i = 0; i < chunks.count(); ++i) {
      const Chunk chunk = chunks.at(i);
      const T* y = static_cast<const T*>(args.y) + (task.g * filters + k0) * a.y.c;
      for (int64_t panel = 0; panel < panels.parts; ++panel) {
        const int64_t k = panels.begin(panel) * kL, width = panels.size(panel) * kL;
        pack_pixels(a, chunk, y + k * a.y.c, filters - k0 - k, width, scratch.pixels + k * chunk.pixels());
      }
      for (int64_t t = 0; t < chunk.taps(); ++t) scratch.taps[t] = t / chunk.rows * at.n + t % chunk.rows * a.stride_h * at.h;
      for (int64_t part = 0; part < channel_blocks.parts; ++part) {
        const int64_t c0 = task.c0 + channel_blocks.begin(part), count = channel_blocks.size(part);
        const T* x = static_cast<const T*>(args.x) + (task.g * channels + c0) * a.x.c;
        if (in_place(a)) {
          x += chunk.n * a.x.n + (chunk.p * a.stride_h - a.pad_top) * a.x.h + (chunk.q * a.stride_w - a.pad_left) * a.x.w;
        } else {
          copy_window(a, chunk, x, count, at, scratch.window);
          x = scratch.window;
        }
        // Part of the channels, where those of a tap are neighbours in w, is a run of rows for each tap.
        const bool in_runs = a.w.c == 1 && count < channels;
        const int64_t runs = in_runs ? plane : 1, run = count * plane / runs;
        for (int64_t panel = 0; panel < panels.parts; ++panel) {
          const int vectors = int(panels.size(panel));
          const int64_t k = panels.begin(panel) * kL, width = vectors * kL;
          const ColumnPiece piece = {0, int32_t(width), 0, 1};
          const EvenSplit tiles(run, GemmTile::rows(vectors));
          for (int64_t tile = 0; tile < runs * tiles.parts; ++tile) {
            const int64_t tap = tile / tiles.parts, in_run = tile % tiles.parts;
            const int64_t first = (in_runs ? tap * channels + c0 : c0 * plane) + tiles.begin(in_run);
            const int rows = int(tiles.size(in_run));
            const T* a_rows[GemmTile::kMaxRows];
            T* out_rows[GemmTile::kMaxRows];
            for (int m = 0; m < rows; ++m) {
              const Element e = element(a, first + m);
              a_rows[m] = x + (e.c - c0) * at.c + e.r * a.dilation_h * at.h + e.s * a.dilation_w;
              out_rows[m] = sums + (task.g * channels * plane + first + m) * step + k0 + k;
            }
            const TileInput<T> in = {a_rows,        a.stride_w,  scratch.pixels + k * chunk.pixels(), width, chunk.taps(),
                                     chunk.columns, scratch.taps};
            const TileOutput<T> out = {out_rows, &piece, 1, i > 0, false, Activation::none, nullptr, nullptr, nullptr, nullptr};
            gemm_tile(rows, vectors, in, out);
          }
        }
      }
    }
  }
}

template <class T>
int64_t workspace(const Conv2dProblem& problem, const Machine& machine) {
  const Conv2dProblem a = flatten(problem);
  Arena arena(nullptr);
  const Scratch<T> counted(arena, a, Chunks(a).largest());
  return arena.used() * machine.threads + sums_bytes<T>(a);
}

template <class T>
void run(const Conv2dProblem& problem, const Conv2dArgs& args, const Context& context) {
  const Conv2dProblem a = flatten(problem);
  const Chunks chunks(a);
  T* sums = static_cast<T*>(context.workspace);
  char* scratch_base = static_cast<char*>(context.workspace) + sums_bytes<T>(a);
  Arena counter(nullptr);
  const Scratch<T> counted(counter, a, chunks.largest());

  // Threads share out filters, or channels where there are too few filters, and never pixels.
  const int64_t vectors = sums_step<T>(a) / kLanes<T>, channels = a.C / a.groups;
  const int threads = context.machine->threads;
  const bool by_filters = vectors >= 2 * threads || channels < threads;
  const int64_t shares = a.groups % threads == 0 || a.groups >= 8 * threads ? 1 : threads;
  parallel_ranges(context, a.groups * shares, [&](int thread, int64_t begin, int64_t end) {
    Arena arena(scratch_base + thread * counter.used());
    const Scratch<T> scratch(arena, a, chunks.largest());
    for (int64_t i = begin; i < end; ++i) {
      const int64_t share = i % shares;
      Task task = {i / shares, 0, vectors, 0, channels};
      if (by_filters) {
        task.first = vectors * share / shares, task.last = vectors * (share + 1) / shares;
      } else {
        task.c0 = channels * share / shares, task.c1 = channels * (share + 1) / shares;
      }
      if (task.first < task.last && task.c0 < task.c1) run_task(a, args, task, chunks, sums, scratch);
    }
  });
  deliver(a, sums, static_cast<T*>(args.w), context);
  if (a.epilogue.bias) bias_gradient<T>(a, args, context);
}

// --- contract
const char* reject(const Conv2dProblem&) { return nullptr; }

template <class T>
double cost(const Conv2dProblem& problem, const Machine& machine) {
  const Conv2dProblem a = flatten(problem);
  const double filters = double(a.K / a.groups), taps = double(a.R * a.S), rows = taps * double(a.C / a.groups);
  const double lanes = filters / double(sums_step<T>(a));
  const double pixels = double(Chunks(a).largest().pixels()), total = double(a.N * a.P * a.Q);
  const double start = pixels / (pixels + 12);         // a tile's prologue and stores take about as long as twelve steps
  const double row = double(a.Q) / (double(a.Q) + 1);  // and the start of an output row as long as one
  const double order = total / (total + 40);           // what it takes to bring a sum into w is worth 40 pixels
  const double pack_y = a.y.c == 1 ? 4 : 12;           // a packed pixel costs as much as its use by so many rows
  // So does a copied element of x, of which strides and dilations make many for each pixel.
  const Chunk largest = Chunks(a).largest();
  const Window size = window(a, largest);
  const double copied = double(size.height * size.width) / double(largest.rows * largest.columns);
  const double pack_x = (in_place(a) ? 0 : a.x.w == 1 ? 4 : 20) * copied;
  const double packs = rows / (rows + pack_y) * filters * taps / (filters * taps + pack_x);
  return conv2d_flops(a) / (peak_flops<T>(machine) * 0.95 * lanes * start * row * order * packs);
}

template <class T>
constexpr Kernel<Conv2dProblem> kKernel = {1.0f, reject, cost<T>, workspace<T>, run<T>};

}  // namespace

extern constinit const Kernel<Conv2dProblem> conv2d_wgrad_implicit_gemm_f32 = kKernel<float>;
extern constinit const Kernel<Conv2dProblem> conv2d_wgrad_implicit_gemm_f64 = kKernel<double>;

}  // namespace fastconv::FASTCONV_TARGET

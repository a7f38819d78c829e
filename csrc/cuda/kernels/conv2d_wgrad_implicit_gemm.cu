// conv2d_wgrad.implicit_gemm: filters x filter elements on the tensor cores, summed over pixels, in bf16 or f16, or in f32
// rounded to tf32, with fp32 sums. Takes every problem; made for channels_last, where the channels of a pixel are neighbours and
// come by asynchronous copies.
//
// The reduction runs over rows of both operands as they lie, so both are transposed on their way to the registers
// (ldmatrix.trans). It is cut into parts of a length that the problem's shape fixes, which blocks/parts.h adds in order.
#include "cuda/blocks/chunks.h"
#include "cuda/blocks/mma.h"
#include "cuda/blocks/parts.h"

namespace fastconv::sm80 {
namespace {

// --- tile: gemm_m = 64 filters of one group x gemm_n = 128 columns, four warps of 32 x 64: 64 sums a thread, and 8 + 16
// registers of fragments for 16 products. Columns are filter elements in the order r, s, c, each tap's channels filled up to
// whole chunks, so that a chunk belongs to one tap. One slice is 32 pixels of halves, 16 of floats, 12 KB; three slices, two of
// them on their way while one is multiplied, and where their pixels lie are 38 KB: two blocks on an sm_86; on an sm_80 registers
// have room for three.
constexpr int kM = 64, kN = 128, kStages = 3, kThreads = 128;
constexpr int kWarpM = 32, kWarpN = 64;
static_assert(kM / kWarpM * (kN / kWarpN) * kWarp == kThreads);

template <class T>
constexpr int kDepth = 64 / int(sizeof(T));
template <class T>
constexpr int kChunksY = kM / kWide<T>;  // of a row, which is a pixel
template <class T>
constexpr int kChunksX = kN / kWide<T>;

// Where a pixel of the output has its numbers, and what it sees of x through a tap at (0, 0), without padding. A pixel that does
// not exist has h < 0.
struct PixelPlace {
  int64_t x, y;
  int h, w;
};

template <class T>
struct Stage {
  T x[kDepth<T> * kN], y[kDepth<T> * kM];
};

template <class T>
struct Shared {
  alignas(128) Stage<T> stages[kStages];
  PixelPlace places[kStages][kDepth<T>];
};
static_assert(2 * (sizeof(Shared<__half>) + 1024) <= 100 << 10 && sizeof(Shared<float>) < sizeof(Shared<__half>));

// Where chunk `chunk` of pixel `row` lies. A row is whole lines of all banks; chunks are exchanged by the row's number. Of halves
// ldmatrix reads the same chunk of eight rows together; of floats, which it cannot transpose, a warp reads two chunks of four
// rows. Either way these are eight different banks of 16 bytes.
template <class T, int kChunks>
FC_DEVICE int swizzled(int row, int chunk) {
  return (row * kChunks + (chunk ^ (sizeof(T) == 4 ? row % 4 * 2 : row % 8))) * kWide<T>;
}

struct Divisors {
  Divisor p, q;                      // pixels to n, p, q
  Divisor chunks, s;                 // chunks of columns to r, s, chunk of the channels
  Divisor tiles_m, tiles_n, groups;  // blocks to part, group, filters, columns
};

// What one block sums.
struct Extent {
  uint32_t pixels, part;      // of the whole reduction, and of one part
  uint32_t filters, columns;  // of a group; the columns of parts.h
};

// --- transform: the slice of one step, brought to shared memory by all threads. Padding and everything past the end is zeros.

// Once for each pixel, which 24 chunks ask for.
FC_DEVICE PixelPlace pixel_place(const Conv2dProblem& a, const Divisors& by, uint32_t n, uint32_t end) {
  if (n >= end) return {0, 0, INT32_MIN, 0};
  const int64_t q = by.q.take(n), p = by.p.take(n), h = p * a.stride_h, w = q * a.stride_w;
  return {n * a.x.n + h * a.x.h + w * a.x.w, n * a.y.n + p * a.y.h + q * a.y.w, int(h), int(w)};
}

// Which chunk a thread brings in its i-th load: neighbouring threads go along the channels where chunks are copied, for they lie
// beside each other, and along the pixels where they are gathered, for that is how NCHW lies.
template <class T, int kChunks, bool kAsync>
struct Share {
  static constexpr int kLoads = kDepth<T> * kChunks / kThreads;
  FC_DEVICE static int row(int i) {
    const int t = int(threadIdx.x);
    return kAsync ? t / kChunks + i * (kThreads / kChunks) : t % kDepth<T>;
  }
  FC_DEVICE static int chunk(int i) {
    const int t = int(threadIdx.x);
    return kAsync ? t % kChunks : t / kDepth<T> + i * (kThreads / kDepth<T>);
  }
};

template <class T, bool kAsyncX, bool kAsyncY>
struct Operands {
  using ShareX = Share<T, kChunksX<T>, kAsyncX>;
  using ShareY = Share<T, kChunksY<T>, kAsyncY>;
  const Conv2dProblem& a;
  const T *x, *y;
  // Of each chunk of columns: its channels at the first pixel, how many there are, and its tap.
  const T* channels[ShareX::kLoads];
  int64_t count[ShareX::kLoads], top[ShareX::kLoads], left[ShareX::kLoads];
  int64_t filter, filters_left;  // the tile's first

  FC_DEVICE Operands(const Conv2dProblem& a, const Divisors& by, const T* x, const T* y, uint32_t first_filter, uint32_t filters,
                     uint32_t first_column)
      : a(a), x(x), y(y), filter(first_filter), filters_left(filters - first_filter) {
    FC_UNROLL
    for (int i = 0; i < ShareX::kLoads; ++i) {
      uint32_t r = first_column / kWide<T> + uint32_t(ShareX::chunk(i));
      const int64_t c = int64_t(by.chunks.take(r)) * kWide<T>, s = by.s.take(r);
      top[i] = r * a.dilation_h - a.pad_top;
      left[i] = s * a.dilation_w - a.pad_left;
      channels[i] = x + c * a.x.c + top[i] * a.x.h + left[i] * a.x.w;
      count[i] = r < a.R ? a.C / a.groups - c : 0;
    }
  }

  FC_DEVICE void bring(Stage<T>& stage, const PixelPlace* places) const {
    FC_UNROLL
    for (int i = 0; i < ShareX::kLoads; ++i) {
      const int row = ShareX::row(i);
      const PixelPlace& at = places[row];
      const int64_t h = at.h + top[i], w = at.w + left[i];
      const bool inside = h >= 0 && h < a.H && w >= 0 && w < a.W;
      bring_chunk<kAsyncX>(stage.x + swizzled<T, kChunksX<T>>(row, ShareX::chunk(i)), channels[i] + at.x, a.x.c, count[i],
                           inside && at.h >= 0, x);
    }
    FC_UNROLL
    for (int i = 0; i < ShareY::kLoads; ++i) {
      const int row = ShareY::row(i), k = ShareY::chunk(i) * kWide<T>;
      const PixelPlace& at = places[row];
      bring_chunk<kAsyncY>(stage.y + swizzled<T, kChunksY<T>>(row, ShareY::chunk(i)), y + at.y + (filter + k) * a.y.c, a.y.c,
                           filters_left - k, at.h >= 0, y);
    }
  }
};

// --- multiply: one slice, by each warp its 32 x 64 sums, and by one warp for each filter what a column of ones gives, which is
// the bias's gradient.
struct Sums {
  float elements[kWarpM / 16][kWarpN / 8][4] = {};
  float ones[kWarpM / 16][4] = {};
};

// Fragments of products k .. of the filters m .. m + 15 (A), or the columns n .. n + 15 (B, eight after eight).
template <class T, int kChunks, bool kOfA>
FC_DEVICE void load_fragment(uint32_t (&r)[4], const T* rows, int k, int first) {
  const int lane = int(threadIdx.x) % kWarp;
  if constexpr (sizeof(T) == 4) {
    FC_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int row = k + lane % 4 + (kOfA ? i / 2 : i % 2) * 4, column = first + lane / 4 + (kOfA ? i % 2 : i / 2) * 8;
      r[i] = word_of(rows[swizzled<T, kChunks>(row, column / 4) + column % 4]);
      round_operand<T>(r[i]);
    }
  } else {
    const int row = kOfA ? lane % 8 + lane / 16 * 8 : lane % 16, chunk = kOfA ? lane / 8 % 2 : lane / 16;
    load_matrices_transposed(r, rows + swizzled<T, kChunks>(k + row, first / kWide<T> + chunk));
  }
}

template <class T>
FC_DEVICE void multiply(const Stage<T>& stage, int warp_m, int warp_n, bool with_ones, Sums& sums) {
  uint32_t one;
  if constexpr (sizeof(T) == 4) {
    one = word_of(1.0f);
  } else {
    one = pair_of<T>(1, 1);
  }
  FC_UNROLL
  for (int k = 0; k < kDepth<T>; k += 32 / int(sizeof(T))) {
    uint32_t y[kWarpM / 16][4], x[kWarpN / 16][4];
    FC_UNROLL
    for (int i = 0; i < kWarpM / 16; ++i) load_fragment<T, kChunksY<T>, true>(y[i], stage.y, k, warp_m + i * 16);
    FC_UNROLL
    for (int j = 0; j < kWarpN / 16; ++j) load_fragment<T, kChunksX<T>, false>(x[j], stage.x, k, warp_n + j * 16);
    FC_UNROLL
    for (int i = 0; i < kWarpM / 16; ++i) {
      FC_UNROLL
      for (int j = 0; j < kWarpN / 8; ++j) {
        multiply_add<T>(sums.elements[i][j], y[i], {x[j / 2][j % 2 * 2], x[j / 2][j % 2 * 2 + 1]});
      }
      if (with_ones) multiply_add<T>(sums.ones[i], y[i], {one, one});
    }
  }
}

// --- run: blocks go through the tiles of one part first, so that those which run together read the same pixels.
template <class T, bool kAsyncX, bool kAsyncY>
__global__ void __launch_bounds__(kThreads)
    implicit_gemm(Conv2dProblem a, Divisors by, Extent extent, const T* x, const T* y, float* parts) {
  Shared<T>& shared = shared_memory<Shared<T>>();
  uint32_t part = blockIdx.x;
  const uint32_t n = by.tiles_n.take(part) * kN, m = by.tiles_m.take(part) * kM, g = by.groups.take(part);
  const uint32_t begin = part * extent.part, rest = extent.pixels - begin, count = rest < extent.part ? rest : extent.part;
  const uint32_t end = begin + count, steps = (count + kDepth<T> - 1) / kDepth<T>;
  const Operands<T, kAsyncX, kAsyncY> operands(a, by, x + g * (a.C / a.groups) * a.x.c, y + int64_t(g) * extent.filters * a.y.c,
                                               m, extent.filters, n);
  const int t = int(threadIdx.x), warp = t / kWarp, lane = t % kWarp;
  const int warp_m = warp % (kM / kWarpM) * kWarpM, warp_n = warp / (kM / kWarpM) * kWarpN;
  const bool with_ones = a.epilogue.bias && n + uint32_t(warp_n) == 0;
  Sums sums;
  if (t < kStages * kDepth<T>) shared.places[t / kDepth<T>][t % kDepth<T>] = pixel_place(a, by, begin + uint32_t(t), end);
  __syncthreads();  // the first places are there
  for (uint32_t step = 0; step < kStages - 1; ++step) {
    if (step < steps) operands.bring(shared.stages[step], shared.places[step]);
    close_copies();
  }
  for (uint32_t step = 0; step < steps; ++step) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // everybody's part of this slice is there, the slice before it has been multiplied, its places were read
    const uint32_t next = step + kStages - 1;
    if (next < steps) operands.bring(shared.stages[next % kStages], shared.places[next % kStages]);
    close_copies();
    if (uint32_t(warp) == step % (kThreads / kWarp) && lane < kDepth<T>) {
      shared.places[step % kStages][lane] = pixel_place(a, by, begin + (step + kStages) * kDepth<T> + uint32_t(lane), end);
    }
    multiply(shared.stages[step % kStages], warp_m, warp_n, with_ones, sums);
  }
  const uint32_t channels = uint32_t(a.C / a.groups), taps = uint32_t(a.R * a.S);
  FC_UNROLL
  for (int i = 0; i < kWarpM / 16; ++i) {
    FC_UNROLL
    for (int half = 0; half < 2; ++half) {
      const uint32_t k = m + uint32_t(warp_m + i * 16 + lane / 4 + half * 8);
      if (k >= extent.filters) continue;
      float* const row = parts + (int64_t(part) * a.K + int64_t(g) * extent.filters + k) * extent.columns;
      if (with_ones && lane % 4 == 0) row[extent.columns - 1] = sums.ones[i][half * 2];
      FC_UNROLL
      for (int j = 0; j < kWarpN / 8; ++j) {
        uint32_t tap = (n + uint32_t(warp_n + j * 8 + lane % 4 * 2)) / kWide<T>;
        const uint32_t c = by.chunks.take(tap) * kWide<T> + uint32_t(lane % 4 * 2) % kWide<T>;
        if (tap >= taps) break;
        FC_UNROLL
        for (uint32_t e = 0; e < 2; ++e) {
          if (c + e < channels) row[tap * channels + c + e] = sums.elements[i][j][half * 2 + int(e)];
        }
      }
    }
  }
}

struct Cut {
  int64_t chunks, tiles_m, tiles_n, parts;  // chunks of a tap
  Extent extent;
};

template <class T>
Cut cut(const Conv2dProblem& a) {
  const int64_t pixels = a.N * a.P * a.Q, filters = a.K / a.groups, chunks = ceil_div(a.C / a.groups, kWide<T>);
  const int64_t tiles_m = ceil_div(filters, kM), tiles_n = ceil_div(a.R * a.S * chunks, kChunksX<T>);
  const int64_t part = part_length(a, tiles_m * tiles_n * a.groups, kDepth<T>);
  return {chunks, tiles_m, tiles_n, ceil_div(pixels, part),
          Extent{uint32_t(pixels), uint32_t(part), uint32_t(filters), uint32_t(filter_columns(a))}};
}

template <class T, bool kAsyncX, bool kAsyncY>
void start(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context) {
  const Cut c = cut<T>(a);
  const Divisors by = {Divisor::by(a.P),       Divisor::by(a.Q),       Divisor::by(c.chunks), Divisor::by(a.S),
                       Divisor::by(c.tiles_m), Divisor::by(c.tiles_n), Divisor::by(a.groups)};
  launch(context, implicit_gemm<T, kAsyncX, kAsyncY>, c.parts * c.tiles_m * c.tiles_n * a.groups, kThreads, sizeof(Shared<T>), a,
         by, c.extent, static_cast<const T*>(args.x), static_cast<const T*>(args.y), static_cast<float*>(context.workspace));
  add_parts<T>(a, args, context, c.parts);
}

template <class T>
bool whole_chunks_x(const Conv2dProblem& a) {
  return a.C / a.groups % kWide<T> == 0 && a.x.c == 1;
}
template <class T>
bool whole_chunks_y(const Conv2dProblem& a) {
  return a.K / a.groups % kWide<T> == 0 && a.y.c == 1;
}

template <class T>
void run(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context) {
  const bool x_fits = whole_chunks_x<T>(a) && packs_fit<T>(args.x, {{a.N, a.x.n}, {a.H, a.x.h}, {a.W, a.x.w}});
  const bool y_fits = whole_chunks_y<T>(a) && packs_fit<T>(args.y, {{a.N, a.y.n}, {a.P, a.y.h}, {a.Q, a.y.w}});
  (x_fits && y_fits ? start<T, true, true> : y_fits ? start<T, false, true> : start<T, false, false>)(a, args, context);
}

// --- contract

// Speeds as conv2d_fwd.implicit_gemm's, where tiles are full.
template <class T>
double cost(const Conv2dProblem& a, const Machine&) {
  const Cut c = cut<T>(a);
  const double filled = double(c.tiles_m * c.tiles_n * a.groups) * kM * kN;
  const bool copied = whole_chunks_x<T>(a) && whole_chunks_y<T>(a);
  return conv2d_flops(a) * filled / double(a.K * a.R * a.S * (a.C / a.groups)) / (copied ? 1 : 0.1) /
         (sizeof(T) == 4 ? 95e12 : 190e12);
}

template <class T>
const char* reject(const Conv2dProblem& a) {
  // Columns are numbered with whole chunks for each tap.
  const int64_t columns = a.R * a.S * ceil_div(a.C / a.groups, kWide<T>) * kWide<T>;
  return image_too_large(columns) ? "a filter has more than 2^30 elements in whole chunks" : parts_reject(a);
}

template <class T>
int64_t workspace(const Conv2dProblem& a, const Machine&) {
  return parts_bytes(a, cut<T>(a).parts);
}

template <class T>
constexpr Kernel<Conv2dProblem> kKernel = {sizeof(T) == 4 ? kTf32Growth : 1.0f, reject<T>, cost<T>, workspace<T>, run<T>};

}  // namespace

extern constinit const Kernel<Conv2dProblem> conv2d_wgrad_implicit_gemm_f32 = kKernel<float>;
extern constinit const Kernel<Conv2dProblem> conv2d_wgrad_implicit_gemm_f16 = kKernel<__half>;
extern constinit const Kernel<Conv2dProblem> conv2d_wgrad_implicit_gemm_bf16 = kKernel<__nv_bfloat16>;

}  // namespace fastconv::sm80

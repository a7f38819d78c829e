// conv2d_fwd.implicit_gemm: pixels x filters on the tensor cores, in bf16 or f16, or in f32 rounded to tf32, with fp32 sums.
// Takes every problem; made for channels_last, where a tap's channels are neighbours and come by asynchronous copies of 16 bytes.
//
// A 1x1 convolution is a plain matrix product, and so is a linear layer.
#include "cuda/blocks/chunks.h"
#include "cuda/blocks/conv2d.h"
#include "cuda/blocks/mma.h"

namespace fastconv::sm80 {
namespace {

// --- tile: gemm_m = 128 pixels x gemm_n = 64 filters of one group, four warps of 64 x 32: 64 sums a thread, and 16 + 8 registers
// of fragments for 16 products. One slice is 64 bytes of a tap's channels: 32 halves, 16 floats. Four slices of 128 + 64 rows are
// 48 KB, which a block gets without asking; three of them are on their way while one is multiplied.
constexpr int kM = 128, kN = 64, kStages = 4, kThreads = 128;
constexpr int kWarpM = 64, kWarpN = 32;
constexpr int kChunks = 4;                       // of a row, 16 bytes each
constexpr int kRowsAtOnce = kThreads / kChunks;  // that the block's threads bring with one chunk each
constexpr int kRowsX = kM / kRowsAtOnce, kRowsW = kN / kRowsAtOnce;
static_assert(kM / kWarpM * (kN / kWarpN) * kWarp == kThreads);

template <class T>
constexpr int kDepth = kChunks * kWide<T>;

template <class T>
struct Stage {
  T x[kM * kDepth<T>], w[kN * kDepth<T>];
};

template <class T>
struct Shared {
  alignas(128) Stage<T> stages[kStages];
};
static_assert(sizeof(Shared<__half>) == 48 << 10 && sizeof(Shared<float>) == 48 << 10);

// Where chunk `chunk` of row `row` lies. A row is 64 bytes, so two rows make a line of all banks; the chunks of every second row
// are exchanged, so that the same chunk of eight rows, which ldmatrix reads together, lies in eight different banks.
template <class T>
FC_DEVICE int swizzled(int row, int chunk) {
  return row * kDepth<T> + (chunk ^ (row / 2 % kChunks)) * kWide<T>;
}

struct Divisors {
  Divisor p, q;              // pixels to n, p, q
  Divisor slices, s;         // steps to r, s, slice of the channels
  Divisor tiles_m, tiles_n;  // blocks to group, filters, pixels
};

// --- transform: the slice of one step, brought to shared memory by all threads. Padding and everything past the end is zeros.
template <class T, bool kAsyncX, bool kAsyncW>
struct Operands {
  const Conv2dProblem& a;
  const Divisors& by;
  const T *x, *w;
  int64_t channels;
  const T* pixels[kRowsX];
  int top[kRowsX], left[kRowsX];
  const T* filter;       // of this thread's first row
  int64_t filters_left;  // from that one on

  FC_DEVICE static int chunk() { return int(threadIdx.x) % kChunks; }
  FC_DEVICE static int row(int i) { return int(threadIdx.x) / kChunks + i * kRowsAtOnce; }

  FC_DEVICE Operands(const Conv2dProblem& a, const Divisors& by, const T* x, const T* w, uint32_t first_pixel, uint32_t end_pixel,
                     int64_t first_filter)
      : a(a), by(by), x(x), w(w), channels(a.C / a.groups) {
    FC_UNROLL
    for (int i = 0; i < kRowsX; ++i) {
      uint32_t n = first_pixel + uint32_t(row(i));
      const bool exists = n < end_pixel;
      const int64_t q = by.q.take(n), p = by.p.take(n);
      pixels[i] = x + int64_t(n) * a.x.n;
      top[i] = exists ? int(p * a.stride_h - a.pad_top) : INT32_MIN;
      left[i] = int(q * a.stride_w - a.pad_left);
    }
    filter = w + (first_filter + row(0)) * a.w.k;
    filters_left = a.K / a.groups - first_filter - row(0);
  }

  FC_DEVICE void bring(Stage<T>& stage, uint32_t step) const {
    uint32_t r = step;
    const int64_t c = int64_t(by.slices.take(r)) * kDepth<T> + chunk() * kWide<T>, s = by.s.take(r);
    FC_UNROLL
    for (int i = 0; i < kRowsX; ++i) {
      const int64_t h = top[i] + r * a.dilation_h, column = left[i] + s * a.dilation_w;
      const bool inside = h >= 0 && h < a.H && column >= 0 && column < a.W;
      bring_chunk<kAsyncX>(stage.x + swizzled<T>(row(i), chunk()), pixels[i] + c * a.x.c + h * a.x.h + column * a.x.w, a.x.c,
                           channels - c, inside, x);
    }
    FC_UNROLL
    for (int i = 0; i < kRowsW; ++i) {
      bring_chunk<kAsyncW>(stage.w + swizzled<T>(row(i), chunk()),
                           filter + i * kRowsAtOnce * a.w.k + c * a.w.c + r * a.w.r + s * a.w.s, a.w.c, channels - c,
                           i * kRowsAtOnce < filters_left, w);
    }
  }
};

// --- multiply: one slice, by each warp its 64 x 32 sums.
using Sums = float[kWarpM / 16][kWarpN / 8][4];

template <class T>
FC_DEVICE void multiply(const Stage<T>& stage, int warp_m, int warp_n, Sums& sums) {
  const int lane = int(threadIdx.x) % kWarp;
  FC_UNROLL
  for (int k = 0; k < kChunks; k += 2) {  // an instruction's products are two chunks
    uint32_t x[kWarpM / 16][4], w[kWarpN / 16][4];
    FC_UNROLL
    for (int i = 0; i < kWarpM / 16; ++i) {
      load_matrices(x[i], stage.x + swizzled<T>(warp_m + i * 16 + lane % 16, k + lane / 16));
      FC_UNROLL
      for (uint32_t& word : x[i]) round_operand<T>(word);
    }
    FC_UNROLL
    for (int j = 0; j < kWarpN / 16; ++j) {
      load_matrices(w[j], stage.w + swizzled<T>(warp_n + j * 16 + lane % 8 + lane / 16 * 8, k + lane / 8 % 2));
      FC_UNROLL
      for (uint32_t& word : w[j]) round_operand<T>(word);
    }
    FC_UNROLL
    for (int i = 0; i < kWarpM / 16; ++i) {
      FC_UNROLL
      for (int j = 0; j < kWarpN / 8; ++j) multiply_add<T>(sums[i][j], x[i], {w[j / 2][j % 2 * 2], w[j / 2][j % 2 * 2 + 1]});
    }
  }
}

// --- run: one block is one tile; blocks go through the pixels first, so that neighbours share their filters.
template <class T, bool kAsyncX, bool kAsyncW>
__global__ void __launch_bounds__(kThreads) implicit_gemm(Conv2dProblem a, Divisors by, uint32_t pixels, uint32_t steps,
                                                          const T* x, const T* w, EpilogueOperands<T> epilogue, T* y) {
  Shared<T>& shared = shared_memory<Shared<T>>();
  uint32_t g = blockIdx.x;
  const uint32_t m = by.tiles_m.take(g) * kM, n = by.tiles_n.take(g) * kN;
  const int64_t channels = a.C / a.groups, filters = a.K / a.groups;
  const Operands<T, kAsyncX, kAsyncW> operands(a, by, x + g * channels * a.x.c, w + g * a.w.g, m, pixels, n);
  const int warp = int(threadIdx.x) / kWarp, warp_m = warp % (kM / kWarpM) * kWarpM, warp_n = warp / (kM / kWarpM) * kWarpN;
  Sums sums = {};
  for (uint32_t step = 0; step < kStages - 1; ++step) {
    if (step < steps) operands.bring(shared.stages[step], step);
    close_copies();
  }
  for (uint32_t step = 0; step < steps; ++step) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // everybody's part of this slice is there, and the slice before it has been multiplied
    if (step + kStages - 1 < steps) operands.bring(shared.stages[(step + kStages - 1) % kStages], step + kStages - 1);
    close_copies();
    multiply(shared.stages[step % kStages], warp_m, warp_n, sums);
  }
  const int lane = int(threadIdx.x) % kWarp;
  FC_UNROLL
  for (int i = 0; i < kWarpM / 16; ++i) {
    FC_UNROLL
    for (int half = 0; half < 2; ++half) {
      uint32_t image = m + uint32_t(warp_m + i * 16 + lane / 4 + half * 8);
      if (image >= pixels) continue;
      const int64_t q = by.q.take(image), p = by.p.take(image);
      const int64_t row = image * a.y.n + p * a.y.h + q * a.y.w;
      FC_UNROLL
      for (int j = 0; j < kWarpN / 8 * 2; ++j) {
        const int64_t k_in_group = n + warp_n + j / 2 * 8 + lane % 4 * 2 + j % 2, k = g * filters + k_in_group;
        if (k_in_group >= filters) continue;
        const int64_t offset = row + k * a.y.c;
        y[offset] = epilogue.apply(a.epilogue.activation, sums[i][j / 2][half * 2 + j % 2], k, offset);
      }
    }
  }
}

template <class T, bool kAsyncX, bool kAsyncW>
void start(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context) {
  const EpilogueOperands<T> epilogue = EpilogueOperands<T>::of(a, args);
  const int64_t slices = ceil_div(a.C / a.groups, kDepth<T>);
  for_image_ranges(a.N, a.P * a.Q, [&](int64_t n, int64_t images) {
    const uint32_t pixels = uint32_t(images * a.P * a.Q);
    const int64_t tiles_m = ceil_div(pixels, kM), tiles_n = ceil_div(a.K / a.groups, kN);
    const Divisors by = {Divisor::by(a.P),     Divisor::by(a.Q),    Divisor::by(slices), Divisor::by(a.S == 0 ? 1 : a.S),
                         Divisor::by(tiles_m), Divisor::by(tiles_n)};
    launch(context, implicit_gemm<T, kAsyncX, kAsyncW>, tiles_m * tiles_n * a.groups, kThreads, sizeof(Shared<T>), a, by, pixels,
           uint32_t(a.R * a.S * slices), static_cast<const T*>(args.x) + n * a.x.n, static_cast<const T*>(args.w),
           epilogue.from_image(n, a.y.n), static_cast<T*>(args.y) + n * a.y.n);
  });
}

template <class T>
bool whole_chunks(const Conv2dProblem& a) {
  return a.C / a.groups % kWide<T> == 0;
}

template <class T>
void run(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context) {
  const bool x_fits = whole_chunks<T>(a) && a.x.c == 1 && packs_fit<T>(args.x, {{a.N, a.x.n}, {a.H, a.x.h}, {a.W, a.x.w}});
  const bool w_fits = whole_chunks<T>(a) && a.w.c == 1 &&
                      packs_fit<T>(args.w, {{a.groups, a.w.g}, {a.K / a.groups, a.w.k}, {a.R, a.w.r}, {a.S, a.w.s}});
  (x_fits && w_fits ? start<T, true, true> : x_fits ? start<T, true, false> : start<T, false, false>)(a, args, context);
}

// --- contract

// 60 % of an A100's 312 TFLOP/s, 156 in tf32, where tiles are full, a tenth of that where x is gathered: estimates.
template <class T>
double cost(const Conv2dProblem& a, const Machine&) {
  const double filters = double(a.K / a.groups), channels = double(a.C / a.groups);
  const double filled =
      double(ceil_div(a.K / a.groups, kN) * kN) / filters * double(ceil_div(a.C / a.groups, kDepth<T>) * kDepth<T>) / channels;
  const double speed = sizeof(T) == 4 ? 95e12 : 190e12;
  return conv2d_flops(a) * filled / (whole_chunks<T>(a) && a.x.c == 1 ? speed : speed / 10);
}

template <class T>
constexpr Kernel<Conv2dProblem> kKernel = {sizeof(T) == 4 ? kTf32Growth : 1.0f, conv2d_reject, cost<T>, no_workspace, run<T>};

}  // namespace

extern constinit const Kernel<Conv2dProblem> conv2d_fwd_implicit_gemm_f32 = kKernel<float>;
extern constinit const Kernel<Conv2dProblem> conv2d_fwd_implicit_gemm_f16 = kKernel<__half>;
extern constinit const Kernel<Conv2dProblem> conv2d_fwd_implicit_gemm_bf16 = kKernel<__nv_bfloat16>;

}  // namespace fastconv::sm80

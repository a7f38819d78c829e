// conv2d_fwd.direct: an implicit GEMM on the FMA units, in strict fp32. Takes every problem, in any strides, and needs no
// workspace: the matrix of pixels is never built, a slice of it is gathered into shared memory.
#include "cuda/blocks/conv2d.h"
#include "cuda/blocks/simt_gemm.h"

namespace fastconv::sm80 {
namespace {

// --- tile: gemm_m = 64 pixels, gemm_n = 64 filters of one group (blocks/simt_gemm.h). The reduction runs over r, s, c, with c
// fastest, which channels_last has as neighbours.
constexpr int kOwn = SimtTile::kOwn;

struct Divisors {
  Divisor p, q;              // pixels to n, p, q
  Divisor c, s;              // reduction to r, s, c
  Divisor tiles_m, tiles_n;  // blocks to group, filters, pixels
};

// --- transform: a pixel's column of the reduction, gathered from x. Padding and rows past the last pixel are zeros.
template <class T>
struct Pixels {
  const Conv2dProblem& a;
  const Divisors& by;
  SimtShare share;
  const T* rows[SimtTile::kLoads];
  int64_t top[SimtTile::kLoads], left[SimtTile::kLoads];

  FC_DEVICE Pixels(const Conv2dProblem& a, const Divisors& by, const T* x, uint32_t first, uint32_t pixels)
      : a(a), by(by), share{a.x.c == 1 && a.C > a.groups} {
    FC_UNROLL
    for (int i = 0; i < SimtTile::kLoads; ++i) {
      uint32_t n = first + uint32_t(share.row(i));
      const bool exists = n < pixels;
      const int64_t q = by.q.take(n), p = by.p.take(n);
      rows[i] = x + int64_t(n) * a.x.n;
      top[i] = exists ? p * a.stride_h - a.pad_top : INT32_MIN;
      left[i] = q * a.stride_w - a.pad_left;
    }
  }
  FC_DEVICE float load(int i, uint32_t d) const {
    const int64_t c = by.c.take(d), s = by.s.take(d);
    const int64_t h = top[i] + d * a.dilation_h, w = left[i] + s * a.dilation_w;
    return h >= 0 && h < a.H && w >= 0 && w < a.W ? to_float(rows[i][c * a.x.c + h * a.x.h + w * a.x.w]) : 0.0f;
  }
};

template <class T>
struct Filters {
  const Conv2dProblem& a;
  const Divisors& by;
  SimtShare share;
  const T* w;
  uint32_t first;

  FC_DEVICE float load(int i, uint32_t d) const {
    const uint32_t k = first + uint32_t(share.row(i));
    if (k >= a.K / a.groups) return 0.0f;
    const int64_t c = by.c.take(d), s = by.s.take(d);
    return to_float(w[k * a.w.k + c * a.w.c + d * a.w.r + s * a.w.s]);
  }
};

// --- multiply: simt_multiply.

// --- run: one block is one tile; blocks go through the pixels first, so that neighbours share their filters.
template <class T>
__global__ void __launch_bounds__(SimtTile::kThreads)
    direct(Conv2dProblem a, Divisors by, uint32_t pixels, const T* x, const T* w, EpilogueOperands<T> epilogue, T* y) {
  uint32_t g = blockIdx.x;
  const uint32_t m = by.tiles_m.take(g) * SimtTile::kM, n = by.tiles_n.take(g) * SimtTile::kN;
  const int64_t channels = a.C / a.groups, filters = a.K / a.groups;
  // Threads go along the dimension that y has as neighbours.
  const int t = int(threadIdx.x), fast = t % 16 * kOwn, slow = t / 16 * kOwn;
  const bool pixels_fast = a.y.w < a.y.c;
  const int own_m = pixels_fast ? fast : slow, own_n = pixels_fast ? slow : fast;
  float sum[kOwn][kOwn] = {};
  simt_multiply(shared_memory<SimtShared>(), 0, uint32_t(channels * a.R * a.S),
                Pixels<T>(a, by, x + g * channels * a.x.c, m, pixels), Filters<T>{a, by, {true}, w + g * a.w.g, n}, own_m, own_n,
                sum);
  FC_UNROLL
  for (int i = 0; i < kOwn; ++i) {
    uint32_t image = m + uint32_t(own_m + i);
    if (image >= pixels) break;
    const int64_t q = by.q.take(image), p = by.p.take(image);
    FC_UNROLL
    for (int j = 0; j < kOwn; ++j) {
      const int64_t k_in_group = n + own_n + j, k = g * filters + k_in_group;
      if (k_in_group >= filters) break;
      const int64_t offset = image * a.y.n + k * a.y.c + p * a.y.h + q * a.y.w;
      y[offset] = epilogue.apply(a.epilogue.activation, sum[i][j], k, offset);
    }
  }
}

template <class T>
void run(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context) {
  const EpilogueOperands<T> epilogue = EpilogueOperands<T>::of(a, args);
  for_image_ranges(a.N, a.P * a.Q, [&](int64_t n, int64_t images) {
    const uint32_t pixels = uint32_t(images * a.P * a.Q);
    const int64_t tiles_m = ceil_div(pixels, SimtTile::kM), tiles_n = ceil_div(a.K / a.groups, SimtTile::kN);
    const Divisors by = {Divisor::by(a.P),     Divisor::by(a.Q),    Divisor::by(a.C / a.groups), Divisor::by(a.S == 0 ? 1 : a.S),
                         Divisor::by(tiles_m), Divisor::by(tiles_n)};
    launch(context, direct<T>, tiles_m * tiles_n * a.groups, SimtTile::kThreads, sizeof(SimtShared), a, by, pixels,
           static_cast<const T*>(args.x) + n * a.x.n, static_cast<const T*>(args.w), epilogue.from_image(n, a.y.n),
           static_cast<T*>(args.y) + n * a.y.n);
  });
}

// --- contract

// 40 % of an A100's 19.5 TFLOP/s where tiles are full: an estimate.
double cost(const Conv2dProblem& a, const Machine&) {
  const double filters = double(a.K / a.groups), filled = double(ceil_div(a.K / a.groups, SimtTile::kN) * SimtTile::kN);
  return conv2d_flops(a) * filled / filters / 8e12;
}

template <class T>
constexpr Kernel<Conv2dProblem> kKernel = {1.0f, conv2d_reject, cost, no_workspace, run<T>};

}  // namespace

extern constinit const Kernel<Conv2dProblem> conv2d_fwd_direct_f32 = kKernel<float>;
extern constinit const Kernel<Conv2dProblem> conv2d_fwd_direct_f16 = kKernel<__half>;
extern constinit const Kernel<Conv2dProblem> conv2d_fwd_direct_bf16 = kKernel<__nv_bfloat16>;

}  // namespace fastconv::sm80

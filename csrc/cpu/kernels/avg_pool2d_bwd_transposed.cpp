// avg_pool2d_bwd.transposed: NCHW with small planes, odd strides or adaptive windows. A vector's worth of planes of y is turned
// into channels in the cache, each position of x gathers its windows there, and the rows of x are turned back.
#include "cpu/blocks/parallel.h"
#include "cpu/blocks/pool_transpose.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- tile: one vector of planes of y as channels, and a band of rows of x, at most 128 KB.
template <class T>
FC_INLINE int64_t y_elements(const Pool2dProblem& a) {
  return pool_round_up(a.P * a.Q, kLanes<T>) * kLanes<T>;
}
template <class T>
FC_INLINE int64_t x_elements(const Pool2dProblem& a) {
  const int64_t rows = pool_band_rows<T>(a.W);
  return pool_round_up((rows < a.H ? rows : a.H) * a.W, kLanes<T>) * kLanes<T>;
}

// --- transform: planes_to_channels, channels_to_planes.

// --- reduce: rows h_begin..h_end-1 of x (H of the band, W, lanes) from y (P, Q, lanes). A row under the windows of the one above
// equals it and is copied.
template <class T>
FC_INLINE void reduce(const Pool2dProblem& a, const PoolGather& gather, int64_t h_begin, int64_t h_end, const T* y, T* x) {
  constexpr int kL = kLanes<T>;
  PoolCover held{-1, -1};
  for (int64_t h = h_begin; h < h_end; ++h, x += a.W * kL) {
    const PoolCover ps = gather.covers.rows[h];
    if (ps.begin == held.begin && ps.end == held.end) {
      for (int64_t w = 0; w < a.W; ++w) store(x + w * kL, load(x + (w - a.W) * kL));
    } else {
      gather_row<1>(gather, y, {a.Q * kL, kL}, a.W, ps, x, kL, kL);
      held = ps;
    }
  }
}

// --- run: one task is one vector of planes of one sample.
template <class T>
void run(const Pool2dProblem& a, const Pool2dArgs& args, const Context& context) {
  constexpr int kL = kLanes<T>;
  const PoolGather gather = pool_gather(a, context.workspace);
  T* const scratches = reinterpret_cast<T*>(static_cast<char*>(context.workspace) + pool_round_up(PoolGather::bytes(a), 64));
  const int64_t blocks = pool_ceil_div(a.C, kL), band = pool_band_rows<T>(a.W);
  parallel_ranges(context, a.N * blocks, [&](int thread, int64_t begin, int64_t end) {
    T* const y_channels = scratches + thread * (y_elements<T>(a) + x_elements<T>(a));
    T* const x_channels = y_channels + y_elements<T>(a);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / blocks, c = task % blocks * kL;
      const int planes = int(a.C - c < kL ? a.C - c : kL);
      T* x = static_cast<T*>(args.x) + n * a.x.n + c * a.x.c;
      planes_to_channels(static_cast<const T*>(args.y) + n * a.y.n + c * a.y.c, a.y.c, planes, a.P * a.Q, y_channels);
      for (int64_t h = 0; h < a.H; h += band) {
        const int64_t h_end = h + band < a.H ? h + band : a.H;
        reduce(a, gather, h, h_end, y_channels, x_channels);
        channels_to_planes(x_channels, (h_end - h) * a.W, x + h * a.W, a.x.c, planes);
      }
    }
  });
}

// --- contract
constexpr int64_t kMostScratch = 512 * 1024;  // half of the smallest L2 that has AVX-512

template <class T>
const char* reject(const Pool2dProblem& a) {
  if (const char* reason = pool_transpose_rejects(a)) return reason;
  if (a.dilation_h != 1 || a.dilation_w != 1) return "average pooling has no dilation";
  if ((y_elements<T>(a) + x_elements<T>(a)) * int64_t(sizeof(T)) > kMostScratch) return "the planes of y exceed the L2";
  return nullptr;
}

// The turning, then per vector of channels 8 cycles, and 3 for each window where several cover a position.
template <class T>
double cost(const Pool2dProblem& a, const Machine& machine) {
  const double windows = pool_taps_h(a) * pool_taps_w(a) * double(a.P * a.Q) / double(a.H * a.W);
  const double vectors = double(a.N * a.H * a.W) * double(pool_ceil_div(a.C, kLanes<T>));
  return pool_seconds(pool_transpose_cycles<T>(a) + vectors * (windows > 1 ? 8 + 3 * windows : 8), machine);
}

template <class T>
int64_t workspace(const Pool2dProblem& a, const Machine& machine) {
  const int64_t elements = y_elements<T>(a) + x_elements<T>(a);
  return pool_round_up(PoolGather::bytes(a), 64) + machine.threads * elements * int64_t(sizeof(T));
}

template <class T>
constexpr Kernel<Pool2dProblem> kKernel = {1.0f, reject<T>, cost<T>, workspace<T>, run<T>};

}  // namespace

extern constinit const Kernel<Pool2dProblem> avg_pool2d_bwd_transposed_f32 = kKernel<float>;
extern constinit const Kernel<Pool2dProblem> avg_pool2d_bwd_transposed_f64 = kKernel<double>;

}  // namespace fastconv::FASTCONV_TARGET

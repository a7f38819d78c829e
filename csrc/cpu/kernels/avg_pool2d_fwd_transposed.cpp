// avg_pool2d_fwd.transposed: NCHW with small planes, odd strides or adaptive windows. A vector's worth of planes is turned into
// channels in the cache, pooled there, and turned back.
#include "cpu/blocks/parallel.h"
#include "cpu/blocks/pool_transpose.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- tile: a band of output rows of one vector of planes: its input and its values, at most 128 KB each.
template <class T>
FC_INLINE int64_t scratch_elements(const Pool2dProblem& a) {
  return pool_band_input<T>(a) + pool_band_output<T>(a);
}

// --- transform: planes_to_channels, channels_to_planes.

// --- reduce: the band, window by window, from x (H of the band, W, lanes) to y (P of the band, Q, lanes).
template <class T>
FC_INLINE void reduce(const Pool2dProblem& a, const PoolWindows& windows, const PoolBand& band, const T* x, T* y) {
  constexpr int kL = kLanes<T>;
  const T* origin = x - band.h_begin * a.W * kL;
  for (int64_t p = band.begin; p < band.end; ++p) {
    for (int64_t q = 0; q < a.Q; ++q, y += kL) {
      const PoolWindow &rows = windows.rows[p], &cols = windows.cols[q];
      vec<T> average[1];
      average_window(origin, {a.W * kL, kL}, T(pool_divisor(a, rows, cols)), rows, cols, kL, average);
      store(y, average[0]);
    }
  }
}

// --- run: one task is one vector of planes of one sample.
template <class T>
void run(const Pool2dProblem& a, const Pool2dArgs& args, const Context& context) {
  constexpr int kL = kLanes<T>;
  const PoolWindows windows = pool_windows(a, context.workspace);
  T* const scratches = reinterpret_cast<T*>(static_cast<char*>(context.workspace) + pool_round_up(PoolWindows::bytes(a), 64));
  const int64_t blocks = pool_ceil_div(a.C, kL);
  parallel_ranges(context, a.N * blocks, [&](int thread, int64_t begin, int64_t end) {
    T* const x_channels = scratches + thread * scratch_elements<T>(a);
    T* const y_channels = x_channels + pool_band_input<T>(a);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / blocks, c = task % blocks * kL;
      const int planes = int(a.C - c < kL ? a.C - c : kL);
      const T* x = static_cast<const T*>(args.x) + n * a.x.n + c * a.x.c;
      T* y = static_cast<T*>(args.y) + n * a.y.n + c * a.y.c;
      for (PoolBand band{0, 0, 0, 0}; band.end < a.P;) {
        band = pool_band<T>(a, windows.rows, band.end);
        planes_to_channels(x + band.h_begin * a.W, a.x.c, planes, (band.h_end - band.h_begin) * a.W, x_channels);
        reduce(a, windows, band, x_channels, y_channels);
        channels_to_planes(y_channels, (band.end - band.begin) * a.Q, y + band.begin * a.Q, a.y.c, planes);
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
  if (pool_has_empty_window(a)) return "a window lies wholly in the padding";
  if (scratch_elements<T>(a) * int64_t(sizeof(T)) > kMostScratch) return "the rows of one window exceed the L2";
  return nullptr;
}

// The turning, then per vector of channels 1.3 cycles a tap and 12 for the division and the loop.
template <class T>
double cost(const Pool2dProblem& a, const Machine& machine) {
  const double vectors = double(a.N * a.P * a.Q) * double(pool_ceil_div(a.C, kLanes<T>));
  return pool_seconds(pool_transpose_cycles<T>(a) + vectors * (12 + 1.3 * pool_taps_h(a) * pool_taps_w(a)), machine);
}

template <class T>
int64_t workspace(const Pool2dProblem& a, const Machine& machine) {
  return pool_round_up(PoolWindows::bytes(a), 64) + machine.threads * scratch_elements<T>(a) * int64_t(sizeof(T));
}

template <class T>
constexpr Kernel<Pool2dProblem> kKernel = {1.0f, reject<T>, cost<T>, workspace<T>, run<T>};

}  // namespace

extern constinit const Kernel<Pool2dProblem> avg_pool2d_fwd_transposed_f32 = kKernel<float>;
extern constinit const Kernel<Pool2dProblem> avg_pool2d_fwd_transposed_f64 = kKernel<double>;

}  // namespace fastconv::FASTCONV_TARGET

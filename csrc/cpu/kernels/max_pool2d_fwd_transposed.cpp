// max_pool2d_fwd.transposed: NCHW with small planes, odd strides or adaptive windows. A vector's worth of planes is turned into
// channels in the cache, pooled there, and turned back.
//
// 14 columns fill no vector and a stride of 3 fits no load, but 16 planes always stand side by side; turning them costs about 10
// cycles for 16 elements.
#include "cpu/blocks/parallel.h"
#include "cpu/blocks/pool_transpose.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- tile: a band of output rows of one vector of planes: its input, values and indices, at most 128 KB each.
template <class T>
struct Scratch {
  using Int = typename int_of<T>::type;
  T *x, *y;      // (H of the band, W, lanes), (P of the band, Q, lanes)
  Int* indices;  // as y
};
template <class T>
FC_INLINE int64_t scratch_elements(const Pool2dProblem& a) {
  return pool_band_input<T>(a) + 2 * pool_band_output<T>(a);
}

// --- transform: planes_to_channels, channels_to_planes.

// --- reduce: the band, window by window.
template <bool kIndices, class T>
FC_INLINE void reduce(const Pool2dProblem& a, const PoolWindows& windows, const PoolBand& band, const Scratch<T>& s) {
  constexpr int kL = kLanes<T>;
  const T* origin = s.x - band.h_begin * a.W * kL;
  int64_t out = 0;
  for (int64_t p = band.begin; p < band.end; ++p) {
    for (int64_t q = 0; q < a.Q; ++q, out += kL) {
      vec<T> best[1];
      index_vec<T> index[1];
      max_window<kIndices>(origin, {a.W * kL, kL}, a.W, windows.rows[p], windows.cols[q], kL, best, index);
      store(s.y + out, best[0]);
      if constexpr (kIndices) index_store<T>(s.indices + out, index[0]);
    }
  }
}

// --- run: one task is one vector of planes of one sample.
template <bool kIndices, class T>
void run_planes(const Pool2dProblem& a, const Pool2dArgs& args, const Context& context) {
  constexpr int kL = kLanes<T>;
  const PoolWindows windows = pool_windows(a, context.workspace);
  T* const scratches = reinterpret_cast<T*>(static_cast<char*>(context.workspace) + pool_round_up(PoolWindows::bytes(a), 64));
  const int64_t blocks = pool_ceil_div(a.C, kL);
  parallel_ranges(context, a.N * blocks, [&](int thread, int64_t begin, int64_t end) {
    Scratch<T> scratch;
    scratch.x = scratches + thread * scratch_elements<T>(a);
    scratch.y = scratch.x + pool_band_input<T>(a);
    scratch.indices = reinterpret_cast<typename Scratch<T>::Int*>(scratch.y + pool_band_output<T>(a));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / blocks, c = task % blocks * kL;
      const int planes = int(a.C - c < kL ? a.C - c : kL);
      const T* x = static_cast<const T*>(args.x) + n * a.x.n + c * a.x.c;
      const int64_t offset = n * a.y.n + c * a.y.c;
      for (PoolBand band{0, 0, 0, 0}; band.end < a.P;) {
        band = pool_band<T>(a, windows.rows, band.end);
        planes_to_channels(x + band.h_begin * a.W, a.x.c, planes, (band.h_end - band.h_begin) * a.W, scratch.x);
        reduce<kIndices>(a, windows, band, scratch);
        const int64_t first = offset + band.begin * a.Q, count = (band.end - band.begin) * a.Q;
        channels_to_planes(scratch.y, count, static_cast<T*>(args.y) + first, a.y.c, planes);
        if constexpr (kIndices) channels_to_planes<T>(scratch.indices, count, args.indices + first, a.y.c, planes);
      }
    }
  });
}

template <class T>
void run(const Pool2dProblem& a, const Pool2dArgs& args, const Context& context) {
  (args.indices ? run_planes<true, T> : run_planes<false, T>)(a, args, context);
}

// --- contract
constexpr int64_t kMostScratch = 512 * 1024;  // half of the smallest L2 that has AVX-512

template <class T>
const char* reject(const Pool2dProblem& a) {
  if (const char* reason = pool_transpose_rejects(a)) return reason;
  if (a.H > INT32_MAX / a.W) return "the plane has 2^31 positions or more";
  if (pool_has_empty_window(a)) return "a window lies wholly in the padding";
  if (scratch_elements<T>(a) * int64_t(sizeof(T)) > kMostScratch) return "the rows of one window exceed the L2";
  return nullptr;
}

// The turning, then per vector of channels 3.5 cycles a tap and 8 for the loop.
template <class T>
double cost(const Pool2dProblem& a, const Machine& machine) {
  const double vectors = double(a.N * a.P * a.Q) * double(pool_ceil_div(a.C, kLanes<T>));
  return pool_seconds(pool_transpose_cycles<T>(a) + vectors * (8 + 3.5 * pool_taps_h(a) * pool_taps_w(a)), machine);
}

template <class T>
int64_t workspace(const Pool2dProblem& a, const Machine& machine) {
  return pool_round_up(PoolWindows::bytes(a), 64) + machine.threads * scratch_elements<T>(a) * int64_t(sizeof(T));
}

template <class T>
constexpr Kernel<Pool2dProblem> kKernel = {1.0f, reject<T>, cost<T>, workspace<T>, run<T>};

}  // namespace

extern constinit const Kernel<Pool2dProblem> max_pool2d_fwd_transposed_f32 = kKernel<float>;
extern constinit const Kernel<Pool2dProblem> max_pool2d_fwd_transposed_f64 = kKernel<double>;

}  // namespace fastconv::FASTCONV_TARGET

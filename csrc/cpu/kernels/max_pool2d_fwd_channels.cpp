// max_pool2d_fwd.channels: NHWC. Vectors run along the channels; the taps of a window are streamed past accumulators.
#include "cpu/blocks/parallel.h"
#include "cpu/blocks/pool_window.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- tile: kVectors vectors of channels of one output.
//
// 4 maxima + 4 indices + 1 tap + its index: 10 registers of 16. Four chains of compare and blend (7 cycles) hide each other, and
// four AVX-512 vectors are the 64 channels of ResNet's stem.
constexpr int kVectors = 4;

// --- transform: none, x is read where it lies.

// --- reduce: one window for kV vectors of channels from x (at the plane's origin) on; n channels, whole vectors unless kV is 1.
template <bool kIndices, int kV, class T>
FC_INLINE void reduce(const Pool2dProblem& a, const T* x, const PoolWindow& rows, const PoolWindow& cols, T* y, int64_t* indices,
                      int n) {
  using Int = typename int_of<T>::type;
  constexpr int kL = kLanes<T>;
  vec<T> best[kV];
  index_vec<T> index[kV];
#pragma GCC unroll 4
  for (int v = 0; v < kV; ++v) {
    best[v] = set1(kPoolLowest<T>);
    index[v] = index_set1<T>(Int(rows.begin * a.W + cols.begin));
  }
  for (int64_t h = rows.begin; h < rows.end; h += rows.step) {
    for (int64_t w = cols.begin; w < cols.end; w += cols.step) {
      const T* tap = x + h * a.x.h + w * a.x.w;
      const index_vec<T> at = index_set1<T>(Int(h * a.W + w));
#pragma GCC unroll 4
      for (int v = 0; v < kV; ++v) {
        const vec<T> value = kV > 1 || n == kL ? load(tap + v * kL) : load(tap, n);
        if constexpr (kIndices) {
          const mask<T> wins = pool_wins(value, best[v]);
          best[v] = blend(wins, value, best[v]);
          index[v] = blend(wins, at, index[v]);
        } else {
          best[v] = pool_max(value, best[v]);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kV; ++v) {
    const int lanes = kV > 1 ? kL : n;
    if (lanes == kL) {
      store(y + v * kL, best[v]);
    } else {
      store(y, best[v], lanes);
    }
    if constexpr (kIndices) store_indices(indices + v * kL, index[v], lanes);
  }
}

// --- run: one task is one block of channels of one output row.
template <bool kIndices, class T>
void run_channels(const Pool2dProblem& a, const Pool2dArgs& args, const Context& context) {
  constexpr int64_t kBlock = kVectors * kLanes<T>;
  PoolWindow* const columns = static_cast<PoolWindow*>(context.workspace);
  pool_windows(pool_axis_w(a), columns);
  const int64_t blocks = pool_ceil_div(a.C, kBlock);
  parallel_ranges(context, a.N * a.P * blocks, [&](int, int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task % blocks, p = task / blocks % a.P, n = task / blocks / a.P;
      const PoolWindow rows = pool_window(pool_axis_h(a), p);
      const int64_t c_end = a.C < (block + 1) * kBlock ? a.C : (block + 1) * kBlock;
      for (int64_t c = block * kBlock; c < c_end;) {
        const T* x = static_cast<const T*>(args.x) + n * a.x.n + c;
        T* y = static_cast<T*>(args.y) + n * a.y.n + p * a.y.h + c;
        int64_t* indices = kIndices ? args.indices + n * a.y.n + p * a.y.h + c : nullptr;
        if (c_end - c == kBlock) {
          for (int64_t q = 0; q < a.Q; ++q) {
            reduce<kIndices, kVectors>(a, x, rows, columns[q], y + q * a.y.w, kIndices ? indices + q * a.y.w : nullptr,
                                       int(kBlock));
          }
          c += kBlock;
        } else {
          const int lanes = int(c_end - c < kLanes<T> ? c_end - c : kLanes<T>);
          for (int64_t q = 0; q < a.Q; ++q) {
            reduce<kIndices, 1>(a, x, rows, columns[q], y + q * a.y.w, kIndices ? indices + q * a.y.w : nullptr, lanes);
          }
          c += lanes;
        }
      }
    }
  });
}

template <class T>
void run(const Pool2dProblem& a, const Pool2dArgs& args, const Context& context) {
  if (args.indices) {
    run_channels<true, T>(a, args, context);
  } else {
    run_channels<false, T>(a, args, context);
  }
}

// --- contract
const char* reject(const Pool2dProblem& a) {
  if (a.x.c != 1 || a.y.c != 1) return "the channels of x and y are not dense";
  if (a.H > INT32_MAX / a.W) return "the plane has 2^31 positions or more";
  if (pool_has_empty_window(a)) return "a window lies wholly in the padding";
  return nullptr;
}

// Per vector of channels: a load and five operations on two ports for each tap, 10 cycles for the stores and the loop.
template <class T>
double cost(const Pool2dProblem& a, const Machine& machine) {
  const double vectors = double(a.N * a.P * a.Q) * double(pool_ceil_div(a.C, kLanes<T>));
  return pool_seconds(vectors * (10 + 3 * pool_taps_h(a) * pool_taps_w(a)), machine);
}

int64_t workspace(const Pool2dProblem& a, const Machine&) { return a.Q * int64_t(sizeof(PoolWindow)); }

template <class T>
constexpr Kernel<Pool2dProblem> kKernel = {1.0f, reject, cost<T>, workspace, run<T>};

}  // namespace

extern constinit const Kernel<Pool2dProblem> max_pool2d_fwd_channels_f32 = kKernel<float>;
extern constinit const Kernel<Pool2dProblem> max_pool2d_fwd_channels_f64 = kKernel<double>;

}  // namespace fastconv::FASTCONV_TARGET

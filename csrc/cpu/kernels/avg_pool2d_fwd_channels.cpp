// avg_pool2d_fwd.channels: NHWC. Vectors run along the channels; the taps of a window are streamed past accumulators.
#include "cpu/blocks/parallel.h"
#include "cpu/blocks/pool_window.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- tile: kVectors vectors of channels of one output.
//
// A sum of the row and a sum of the window for each, 8 registers of 16; four chains hide the 4 cycles of an addition.
constexpr int kVectors = 4;

// --- transform: none, x is read where it lies.

// --- reduce: one window for kV vectors of channels from x (at the plane's origin) on; n channels, whole vectors unless kV is 1.
// Each row of the window is summed on its own, so that rounding grows with R + S and not with R * S.
template <int kV, class T>
FC_INLINE void reduce(const Pool2dProblem& a, const T* x, const PoolWindow& rows, const PoolWindow& cols, T* y, int n) {
  constexpr int kL = kLanes<T>;
  vec<T> sum[kV];
#pragma GCC unroll 4
  for (int v = 0; v < kV; ++v) sum[v] = zero<T>();
  for (int64_t h = rows.begin; h < rows.end; ++h) {
    vec<T> row_sum[kV];
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) row_sum[v] = zero<T>();
    for (int64_t w = cols.begin; w < cols.end; ++w) {
      const T* tap = x + h * a.x.h + w * a.x.w;
#pragma GCC unroll 4
      for (int v = 0; v < kV; ++v) row_sum[v] = row_sum[v] + (kV > 1 || n == kL ? load(tap + v * kL) : load(tap, n));
    }
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) sum[v] = sum[v] + row_sum[v];
  }
  const vec<T> divisor = set1(T(pool_divisor(a, rows, cols)));
#pragma GCC unroll 4
  for (int v = 0; v < kV; ++v) {
    if (kV > 1 || n == kL) {
      store(y + v * kL, sum[v] / divisor);
    } else {
      store(y, sum[v] / divisor, n);
    }
  }
}

// --- run: one task is one block of channels of one output row.
template <class T>
void run(const Pool2dProblem& a, const Pool2dArgs& args, const Context& context) {
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
        if (c_end - c == kBlock) {
          for (int64_t q = 0; q < a.Q; ++q) reduce<kVectors>(a, x, rows, columns[q], y + q * a.y.w, int(kBlock));
          c += kBlock;
        } else {
          const int lanes = int(c_end - c < kLanes<T> ? c_end - c : kLanes<T>);
          for (int64_t q = 0; q < a.Q; ++q) reduce<1>(a, x, rows, columns[q], y + q * a.y.w, lanes);
          c += lanes;
        }
      }
    }
  });
}

// --- contract
const char* reject(const Pool2dProblem& a) {
  if (a.x.c != 1 || a.y.c != 1) return "the channels of x and y are not dense";
  if (a.dilation_h != 1 || a.dilation_w != 1) return "average pooling has no dilation";
  if (pool_has_empty_window(a)) return "a window lies wholly in the padding";
  return nullptr;
}

// Per vector of channels: a load and an addition for each tap, 15 cycles for the division, the store and the loop.
template <class T>
double cost(const Pool2dProblem& a, const Machine& machine) {
  const double vectors = double(a.N * a.P * a.Q) * double(pool_ceil_div(a.C, kLanes<T>));
  return pool_seconds(vectors * (15 + pool_taps_h(a) * pool_taps_w(a)), machine);
}

int64_t workspace(const Pool2dProblem& a, const Machine&) { return a.Q * int64_t(sizeof(PoolWindow)); }

template <class T>
constexpr Kernel<Pool2dProblem> kKernel = {1.0f, reject, cost<T>, workspace, run<T>};

}  // namespace

extern constinit const Kernel<Pool2dProblem> avg_pool2d_fwd_channels_f32 = kKernel<float>;
extern constinit const Kernel<Pool2dProblem> avg_pool2d_fwd_channels_f64 = kKernel<double>;

}  // namespace fastconv::FASTCONV_TARGET

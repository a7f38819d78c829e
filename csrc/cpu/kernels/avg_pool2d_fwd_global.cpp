// avg_pool2d_fwd.global: NCHW, the average of whole planes. Each plane is one run of memory; a vector's worth of their partial
// sums is transposed in registers, so that the trees of all of them are additions of vectors.
#include "cpu/blocks/parallel.h"
#include "cpu/blocks/pool_window.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- tile: kLanes planes, for each a vector of sums; four while a plane lasts, because an addition takes four cycles.
constexpr int kSums = 4;

// --- reduce: lane i of the result is the sum of the first `count` elements of plane i. The order depends on the count alone.
template <class T>
FC_INLINE vec<T> plane_sum(const T* x, int64_t count) {
  constexpr int kL = kLanes<T>;
  vec<T> sum[kSums] = {zero<T>(), zero<T>(), zero<T>(), zero<T>()};
  int64_t i = 0;
  for (; i + kSums * kL <= count; i += kSums * kL) {
#pragma GCC unroll 4
    for (int v = 0; v < kSums; ++v) sum[v] = sum[v] + load(x + i + v * kL);
  }
  for (; i + kL <= count; i += kL) sum[0] = sum[0] + load(x + i);
  if (i < count) sum[1] = sum[1] + load(x + i, int(count - i));
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

template <class T>
FC_INLINE vec<T> plane_sums(const T* x, int64_t step, int planes, int64_t count) {
  constexpr int kL = kLanes<T>;
  vec<T> block[kL];
  for (int i = 0; i < kL; ++i) block[i] = i < planes ? plane_sum(x + i * step, count) : zero<T>();
  transpose(block);
#pragma GCC unroll 4
  for (int half = kL / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) block[i] = block[i] + block[i + half];
  }
  return block[0];
}

// --- run: one task is one vector of planes of one sample.
template <class T>
void run(const Pool2dProblem& a, const Pool2dArgs& args, const Context& context) {
  constexpr int kL = kLanes<T>;
  const int64_t blocks = pool_ceil_div(a.C, kL);
  const T divisor = T(pool_divisor(a, pool_window(pool_axis_h(a), 0), pool_window(pool_axis_w(a), 0)));
  parallel_ranges(context, a.N * blocks, [&](int, int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / blocks, c = task % blocks * kL;
      const int planes = int(a.C - c < kL ? a.C - c : kL);
      const vec<T> sums = plane_sums(static_cast<const T*>(args.x) + n * a.x.n + c * a.x.c, a.x.c, planes, a.H * a.W);
      T* y = static_cast<T*>(args.y) + n * a.y.n + c * a.y.c;
      a.y.c == 1 ? store(y, sums / set1(divisor), planes) : store_strided(y, a.y.c, sums / set1(divisor), planes);
    }
  });
}

// --- contract
const char* reject(const Pool2dProblem& a) {
  if (a.P != 1 || a.Q != 1) return "there is more than one window";
  const PoolWindow rows = pool_window(pool_axis_h(a), 0), cols = pool_window(pool_axis_w(a), 0);
  if (rows.begin != 0 || rows.end != a.H || cols.begin != 0 || cols.end != a.W) return "the window is not the whole plane";
  if (a.dilation_h != 1 || a.dilation_w != 1) return "average pooling has no dilation";
  if (a.x.w != 1 || (a.H > 1 && a.x.h != a.W)) return "the planes of x are not dense";
  return nullptr;
}

// As measured (AVX-512): 100 cycles a vector of planes, and 2 for each vector of each plane.
template <class T>
double cost(const Pool2dProblem& a, const Machine& machine) {
  const double vectors = double(pool_ceil_div(a.H * a.W, kLanes<T>));
  return pool_seconds(double(a.N * pool_ceil_div(a.C, kLanes<T>)) * (100 + 2 * kLanes<T> * vectors), machine);
}

int64_t workspace(const Pool2dProblem&, const Machine&) { return 0; }

template <class T>
constexpr Kernel<Pool2dProblem> kKernel = {1.0f, reject, cost<T>, workspace, run<T>};

}  // namespace

extern constinit const Kernel<Pool2dProblem> avg_pool2d_fwd_global_f32 = kKernel<float>;
extern constinit const Kernel<Pool2dProblem> avg_pool2d_fwd_global_f64 = kKernel<double>;

}  // namespace fastconv::FASTCONV_TARGET

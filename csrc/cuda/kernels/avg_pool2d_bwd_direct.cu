// avg_pool2d_bwd.direct: one thread for each x, or for a 16-byte pack of channels of it: the sum of the windows that cover it.
// Gathered, not scattered: no atomics. Any strides, any window.
#include "cuda/blocks/pooling.h"

namespace fastconv::sm80 {
namespace {

// --- tile: kPack sums in registers.

// --- transform: none, y is read where it lies.

// --- reduce: in the order of p, then q.
template <int kPack, class T>
FC_DEVICE void reduce(const Pool2dProblem& a, const T* y, int64_t h, int64_t w, float (&sum)[kPack]) {
  const PoolAxis axis_h = pool_axis_h(a), axis_w = pool_axis_w(a);
  const PoolCover ps = pool_cover(axis_h, h), qs = pool_cover(axis_w, w);
  for (int64_t p = ps.begin; p < ps.end; ++p) {
    const PoolWindow rows = pool_window(axis_h, p);
    for (int64_t q = qs.begin; q < qs.end; ++q) {
      const float divisor = float(pool_divisor(a, rows, pool_window(axis_w, q)));
      const Pack<T, kPack> in = load_pack<kPack>(y + p * a.y.h + q * a.y.w);
      FC_UNROLL
      for (int j = 0; j < kPack; ++j) sum[j] += to_float(in.v[j]) / divisor;
    }
  }
}

// --- run
template <class T, int kPack>
__global__ void gather(Pool2dProblem a, Walk walk, uint32_t count, T* x, const T* y) {
  const uint32_t number = thread_number();
  if (number >= count) return;
  const Place at = walk.place(number);
  const int64_t c = int64_t(at.c) * kPack;
  float sum[kPack] = {};
  reduce(a, y + at.n * a.y.n + c * a.y.c, at.h, at.w, sum);
  Pack<T, kPack> out;
  FC_UNROLL
  for (int j = 0; j < kPack; ++j) out.v[j] = from_float<T>(sum[j]);
  store_pack(x + at.n * a.x.n + c * a.x.c + at.h * a.x.h + at.w * a.x.w, out);
}

template <class T, int kPack>
void start(const Pool2dProblem& a, const Pool2dArgs& args, const Context& context) {
  const Walk walk = Walk::over(a.x, a.C, a.H, a.W, kPack);
  for_image_ranges(a.N, walk.image, [&](int64_t n, int64_t images) {
    const uint32_t count = uint32_t(images * walk.image);
    launch(context, gather<T, kPack>, pool_blocks(count), kPoolThreads, 0, a, walk, count, static_cast<T*>(args.x) + n * a.x.n,
           static_cast<const T*>(args.y) + n * a.y.n);
  });
}

template <class T>
void run(const Pool2dProblem& a, const Pool2dArgs& args, const Context& context) {
  (pool_is_wide<T>(a, args) ? start<T, kWide<T>> : start<T, 1>)(a, args, context);
}

// --- contract
template <class T>
constexpr Kernel<Pool2dProblem> kKernel = {1.0f, avg_pool_reject, pool_cost<T>, pool_workspace, run<T>};

}  // namespace

extern constinit const Kernel<Pool2dProblem> avg_pool2d_bwd_direct_f32 = kKernel<float>;
extern constinit const Kernel<Pool2dProblem> avg_pool2d_bwd_direct_f16 = kKernel<__half>;
extern constinit const Kernel<Pool2dProblem> avg_pool2d_bwd_direct_bf16 = kKernel<__nv_bfloat16>;

}  // namespace fastconv::sm80

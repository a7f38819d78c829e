// avg_pool2d_fwd.direct: one thread for each output, or for a 16-byte pack of channels of it. Any strides, any window.
#include "cuda/blocks/pooling.h"

namespace fastconv::sm80 {
namespace {

// --- tile: kPack sums in registers.

// --- transform: none, x is read where it lies.

// --- reduce: each row of the window is summed on its own, so that rounding grows with R + S and not with R * S.
template <int kPack, class T>
FC_DEVICE void reduce(const Pool2dProblem& a, const T* plane, const PoolWindow& rows, const PoolWindow& cols,
                      float (&sum)[kPack]) {
  for (int64_t h = rows.begin; h < rows.end; ++h) {
    float row_sum[kPack] = {};
    for (int64_t w = cols.begin; w < cols.end; ++w) {
      const Pack<T, kPack> in = load_pack<kPack>(plane + h * a.x.h + w * a.x.w);
      FC_UNROLL
      for (int j = 0; j < kPack; ++j) row_sum[j] += to_float(in.v[j]);
    }
    FC_UNROLL
    for (int j = 0; j < kPack; ++j) sum[j] += row_sum[j];
  }
}

// --- run
template <class T, int kPack>
__global__ void pool(Pool2dProblem a, Walk walk, uint32_t count, const T* x, T* y) {
  const uint32_t number = thread_number();
  if (number >= count) return;
  const Place at = walk.place(number);
  const int64_t c = int64_t(at.c) * kPack;
  const PoolWindow rows = pool_window(pool_axis_h(a), at.h), cols = pool_window(pool_axis_w(a), at.w);
  float sum[kPack] = {};
  float divisor = 1;
  if (!rows.empty() && !cols.empty()) {
    reduce(a, x + at.n * a.x.n + c * a.x.c, rows, cols, sum);
    divisor = float(pool_divisor(a, rows, cols));
  }
  Pack<T, kPack> out;
  FC_UNROLL
  for (int j = 0; j < kPack; ++j) out.v[j] = from_float<T>(sum[j] / divisor);
  store_pack(y + at.n * a.y.n + c * a.y.c + at.h * a.y.h + at.w * a.y.w, out);
}

template <class T, int kPack>
void start(const Pool2dProblem& a, const Pool2dArgs& args, const Context& context) {
  const Walk walk = Walk::over(a.y, a.C, a.P, a.Q, kPack);
  for_image_ranges(a.N, walk.image, [&](int64_t n, int64_t images) {
    const uint32_t count = uint32_t(images * walk.image);
    launch(context, pool<T, kPack>, pool_blocks(count), kPoolThreads, 0, a, walk, count,
           static_cast<const T*>(args.x) + n * a.x.n, static_cast<T*>(args.y) + n * a.y.n);
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

extern constinit const Kernel<Pool2dProblem> avg_pool2d_fwd_direct_f32 = kKernel<float>;
extern constinit const Kernel<Pool2dProblem> avg_pool2d_fwd_direct_f16 = kKernel<__half>;
extern constinit const Kernel<Pool2dProblem> avg_pool2d_fwd_direct_bf16 = kKernel<__nv_bfloat16>;

}  // namespace fastconv::sm80

// max_pool2d_bwd.direct: one thread for each x, or for a 16-byte pack of channels of it, which looks for its own index in the
// windows that reach it. Gathered, not scattered: no atomics, so the sum of each x is in the order of (p, q), always. Any
// strides.
//
// It needs the windows, which the indices alone do not tell.
#include "cuda/blocks/pooling.h"

namespace fastconv::sm80 {
namespace {

// --- tile: kPack sums in registers.

// --- transform: a dilated window is searched as if it had no holes. An index never points into a hole.
FC_DEVICE PoolCover cover(PoolAxis axis, int64_t i) {
  axis.size = (axis.size - 1) * axis.dilation + 1;
  return pool_cover(axis, i);
}

// --- reduce: in the order of p, then q.
template <int kPack, class T>
FC_DEVICE void reduce(const Pool2dProblem& a, const T* y, const int64_t* indices, int64_t h, int64_t w, float (&sum)[kPack]) {
  const PoolCover ps = cover(pool_axis_h(a), h), qs = cover(pool_axis_w(a), w);
  const int64_t position = h * a.W + w;
  for (int64_t p = ps.begin; p < ps.end; ++p) {
    for (int64_t q = qs.begin; q < qs.end; ++q) {
      const int64_t offset = p * a.y.h + q * a.y.w;
      const Pack<T, kPack> in = load_pack<kPack>(y + offset);
      FC_UNROLL
      for (int j = 0; j < kPack; ++j) {
        if (indices[offset + j] == position) sum[j] += to_float(in.v[j]);
      }
    }
  }
}

// --- run
template <class T, int kPack>
__global__ void gather(Pool2dProblem a, Walk walk, uint32_t count, T* x, const T* y, const int64_t* indices) {
  const uint32_t number = thread_number();
  if (number >= count) return;
  const Place at = walk.place(number);
  const int64_t c = int64_t(at.c) * kPack, plane = at.n * a.y.n + c * a.y.c;
  float sum[kPack] = {};
  reduce(a, y + plane, indices + plane, at.h, at.w, sum);
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
           static_cast<const T*>(args.y) + n * a.y.n, args.indices + n * a.y.n);
  });
}

template <class T>
void run(const Pool2dProblem& a, const Pool2dArgs& args, const Context& context) {
  (pool_is_wide<T>(a, args) ? start<T, kWide<T>> : start<T, 1>)(a, args, context);
}

// --- contract
const char* reject(const Pool2dProblem& a) { return a.adaptive || a.R * a.S != 0 ? pool_reject(a) : "the windows are not known"; }

template <class T>
constexpr Kernel<Pool2dProblem> kKernel = {1.0f, reject, pool_cost<T>, pool_workspace, run<T>};

}  // namespace

extern constinit const Kernel<Pool2dProblem> max_pool2d_bwd_direct_f32 = kKernel<float>;
extern constinit const Kernel<Pool2dProblem> max_pool2d_bwd_direct_f16 = kKernel<__half>;
extern constinit const Kernel<Pool2dProblem> max_pool2d_bwd_direct_bf16 = kKernel<__nv_bfloat16>;

}  // namespace fastconv::sm80

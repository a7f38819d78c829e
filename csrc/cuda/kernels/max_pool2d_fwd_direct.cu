// max_pool2d_fwd.direct: one thread for each output, or for a 16-byte pack of channels of it. Any strides, any window.
#include "cuda/blocks/pooling.h"

namespace fastconv::sm80 {
namespace {

// --- tile: the best value of kPack neighbouring channels and where it lies, in registers.
template <int kPack>
struct Best {
  float value[kPack];
  int index[kPack];
};

// --- transform: none, x is read where it lies. Windows overlap, so most of a window comes from the L1 cache.

// --- reduce: the window rows x cols, in the order of rows, then columns; a later value wins when it is larger or NaN. A window
// wholly in the padding is -inf at -1.
template <int kPack, class T>
FC_DEVICE Best<kPack> reduce(const Pool2dProblem& a, const T* plane, const PoolWindow& rows, const PoolWindow& cols) {
  Best<kPack> best;
  FC_UNROLL
  for (int j = 0; j < kPack; ++j) {
    best.value[j] = -INFINITY;
    best.index[j] = rows.empty() || cols.empty() ? -1 : int(rows.begin * a.W + cols.begin);
  }
  for (int64_t h = rows.begin; h < rows.end; h += rows.step) {
    for (int64_t w = cols.begin; w < cols.end; w += cols.step) {
      const Pack<T, kPack> in = load_pack<kPack>(plane + h * a.x.h + w * a.x.w);
      FC_UNROLL
      for (int j = 0; j < kPack; ++j) {
        const float value = to_float(in.v[j]);
        if (value > best.value[j] || value != value) {
          best.value[j] = value;
          best.index[j] = int(h * a.W + w);
        }
      }
    }
  }
  return best;
}

// --- run
template <class T, int kPack>
__global__ void pool(Pool2dProblem a, Walk walk, uint32_t count, const T* x, T* y, int64_t* indices) {
  const uint32_t number = thread_number();
  if (number >= count) return;
  const Place at = walk.place(number);
  const int64_t c = int64_t(at.c) * kPack, offset = at.n * a.y.n + c * a.y.c + at.h * a.y.h + at.w * a.y.w;
  const Best<kPack> best =
      reduce<kPack>(a, x + at.n * a.x.n + c * a.x.c, pool_window(pool_axis_h(a), at.h), pool_window(pool_axis_w(a), at.w));
  Pack<T, kPack> out;
  FC_UNROLL
  for (int j = 0; j < kPack; ++j) out.v[j] = from_float<T>(best.value[j]);
  store_pack(y + offset, out);
  if (!indices) return;
  FC_UNROLL
  for (int j = 0; j < kPack; ++j) indices[offset + j] = best.index[j];
}

template <class T, int kPack>
void start(const Pool2dProblem& a, const Pool2dArgs& args, const Context& context) {
  const Walk walk = Walk::over(a.y, a.C, a.P, a.Q, kPack);
  for_image_ranges(a.N, walk.image, [&](int64_t n, int64_t images) {
    const uint32_t count = uint32_t(images * walk.image);
    launch(context, pool<T, kPack>, pool_blocks(count), kPoolThreads, 0, a, walk, count,
           static_cast<const T*>(args.x) + n * a.x.n, static_cast<T*>(args.y) + n * a.y.n,
           args.indices ? args.indices + n * a.y.n : nullptr);
  });
}

template <class T>
void run(const Pool2dProblem& a, const Pool2dArgs& args, const Context& context) {
  (pool_is_wide<T>(a, args) ? start<T, kWide<T>> : start<T, 1>)(a, args, context);
}

// --- contract
template <class T>
constexpr Kernel<Pool2dProblem> kKernel = {1.0f, pool_reject, pool_cost<T>, pool_workspace, run<T>};

}  // namespace

extern constinit const Kernel<Pool2dProblem> max_pool2d_fwd_direct_f32 = kKernel<float>;
extern constinit const Kernel<Pool2dProblem> max_pool2d_fwd_direct_f16 = kKernel<__half>;
extern constinit const Kernel<Pool2dProblem> max_pool2d_fwd_direct_bf16 = kKernel<__nv_bfloat16>;

}  // namespace fastconv::sm80

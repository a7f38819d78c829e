// conv2d_fwd.depthwise: one thread for four neighbouring outputs of a 16-byte pack of channels (channels_last), or for one
// output.
//
// There is no sum over channels worth sharing, so nothing goes through shared memory: inputs that windows share come from the L1
// cache. Any window, stride, dilation and multiplier.
#include "cuda/blocks/conv2d.h"

namespace fastconv::sm80 {
namespace {

// --- tile: kColumns outputs x kPack channels. 4 x 8 sums + a pack of inputs + a pack of weights: 48 registers of the 255, and a
// weight is used four times for each load.
constexpr int kThreads = 256;
constexpr int kWideColumns = 4;

// --- transform: none.

// --- multiply: in the order of c, r, s. Taps in the padding are skipped.
template <int kPack, int kColumns, class T>
FC_DEVICE void multiply(const Conv2dProblem& a, const T* x, const T* w, int p, int q, float (&sum)[kColumns][kPack]) {
  const int64_t top = p * a.stride_h - a.pad_top, left = q * a.stride_w - a.pad_left;
  for (int64_t c = 0; c < a.C / a.groups; ++c) {
    for (int64_t r = 0; r < a.R; ++r) {
      const int64_t h = top + r * a.dilation_h;
      if (h < 0 || h >= a.H) continue;
      for (int64_t s = 0; s < a.S; ++s) {
        float weight[kPack];
        FC_UNROLL
        for (int j = 0; j < kPack; ++j) weight[j] = to_float(w[j * a.w.g + c * a.w.c + r * a.w.r + s * a.w.s]);
        FC_UNROLL
        for (int i = 0; i < kColumns; ++i) {
          const int64_t column = left + i * a.stride_w + s * a.dilation_w;
          if (column < 0 || column >= a.W) continue;
          const Pack<T, kPack> in = load_pack<kPack>(x + c * a.x.c + h * a.x.h + column * a.x.w);
          FC_UNROLL
          for (int j = 0; j < kPack; ++j) sum[i][j] = fmaf(to_float(in.v[j]), weight[j], sum[i][j]);
        }
      }
    }
  }
}

// --- run
template <class T, int kPack, int kColumns>
__global__ void depthwise(Conv2dProblem a, Walk walk, Divisor filters, uint32_t count, const T* x, const T* w,
                          EpilogueOperands<T> epilogue, T* y) {
  const uint32_t number = thread_number();
  if (number >= count) return;
  const Place at = walk.place(number);
  const int k = at.c * kPack, q = at.w * kColumns;
  uint32_t g = uint32_t(k);
  const int64_t k_in_group = filters.take(g);
  float sum[kColumns][kPack] = {};
  multiply<kPack, kColumns>(a, x + at.n * a.x.n + g * (a.C / a.groups) * a.x.c, w + g * a.w.g + k_in_group * a.w.k, at.h, q, sum);
  FC_UNROLL
  for (int i = 0; i < kColumns; ++i) {
    if (q + i >= a.Q) break;
    const int64_t offset = at.n * a.y.n + k * a.y.c + at.h * a.y.h + (q + i) * a.y.w;
    Pack<T, kPack> out;
    FC_UNROLL
    for (int j = 0; j < kPack; ++j) out.v[j] = epilogue.apply(a.epilogue.activation, sum[i][j], k + j, offset + j);
    store_pack(y + offset, out);
  }
}

template <class T, int kPack, int kColumns>
void start(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context) {
  const Walk walk = Walk::over(a.y, a.K, a.P, ceil_div(a.Q, kColumns), kPack);
  const EpilogueOperands<T> epilogue = EpilogueOperands<T>::of(a, args);
  for_image_ranges(a.N, walk.image, [&](int64_t n, int64_t images) {
    const uint32_t count = uint32_t(images * walk.image);
    launch(context, depthwise<T, kPack, kColumns>, ceil_div(count, kThreads), kThreads, 0, a, walk, Divisor::by(a.K / a.groups),
           count, static_cast<const T*>(args.x) + n * a.x.n, static_cast<const T*>(args.w), epilogue.from_image(n, a.y.n),
           static_cast<T*>(args.y) + n * a.y.n);
  });
}

template <class T>
bool is_wide(const Conv2dProblem& a, const Conv2dArgs& args) {
  return a.C == a.groups && a.K == a.groups && a.x.c == 1 && a.y.c == 1 && a.C % kWide<T> == 0 &&
         packs_fit<T>(args.x, {{a.N, a.x.n}, {a.H, a.x.h}, {a.W, a.x.w}}) &&
         packs_fit<T>(args.y, {{a.N, a.y.n}, {a.P, a.y.h}, {a.Q, a.y.w}});
}

template <class T>
void run(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context) {
  (is_wide<T>(a, args) ? start<T, kWide<T>, kWideColumns> : start<T, 1, 1>)(a, args, context);
}

// --- contract
constexpr int kMostChannels = 4;

const char* reject(const Conv2dProblem& a) {
  if (a.groups == 1 || a.C / a.groups > kMostChannels)
    return "a group has more than 4 input channels, or there is one group only";
  return conv2d_reject(a);
}

// The memory is read and written once, at 2 TB/s; the sums run at a tenth of the FMA peak, an estimate.
template <class T>
double cost(const Conv2dProblem& a, const Machine&) {
  const double bytes = sizeof(T) * double(a.N) * double(a.C * a.H * a.W + a.K * a.P * a.Q);
  return bytes / 2e12 + conv2d_flops(a) / 2e12;
}

template <class T>
constexpr Kernel<Conv2dProblem> kKernel = {1.0f, reject, cost<T>, no_workspace, run<T>};

}  // namespace

extern constinit const Kernel<Conv2dProblem> conv2d_fwd_depthwise_f32 = kKernel<float>;
extern constinit const Kernel<Conv2dProblem> conv2d_fwd_depthwise_f16 = kKernel<__half>;
extern constinit const Kernel<Conv2dProblem> conv2d_fwd_depthwise_bf16 = kKernel<__nv_bfloat16>;

}  // namespace fastconv::sm80

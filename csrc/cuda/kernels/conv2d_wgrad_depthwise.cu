// conv2d_wgrad.depthwise: the filter gradient where a group has few input channels. Each tensor is read from memory once: a block
// goes through its pixels as often as there are groups of taps, and meets them in the L1 cache from the second time on.
//
// As in conv2d_wgrad.direct, the pixels are cut into parts whose length the problem's shape fixes, and the parts are added in
// order.
#include "cuda/blocks/conv2d.h"
#include "cuda/blocks/parts.h"

namespace fastconv::sm80 {
namespace {

// --- tile: 256 threads are `lanes` filters x 256 / lanes pixels; each thread sums kTaps taps of its filter in registers.
//
// channels_last has 32 filters side by side, one warp: 512 pixels of 32 fp32 channels are 64 KB of x, a third of an A100's L1
// cache. Otherwise pixels are neighbours, and a block has one filter and 4096 pixels.
constexpr int kThreads = 256;
constexpr int kTaps = 9;
// Threads of a filter are added in chains of 8, so that rounding grows with 8 + 256 / 8 and not with 256.
constexpr int kChain = 8;
static_assert(kThreads / kWarp % kChain == 0);

struct Split {
  int lanes;
  uint32_t part;  // pixels of one part
};

Split split(const Conv2dProblem& a) { return a.y.c < a.y.w ? Split{kWarp, 512} : Split{1, 4096}; }

struct Shared {
  float sums[kTaps][kThreads];
};

struct Divisors {
  Divisor p, q;     // pixels to n, p, q
  Divisor c, s;     // columns to r, s, c
  Divisor filters;  // k to g, k in the group
  Divisor parts;    // blocks to filters, part
};

// One tap of a thread's filter: where its input is for pixel (n, 0, 0), relative to x.
template <class T>
struct Tap {
  const T* x;
  int64_t top, left;
  bool one;
};

// --- transform: none.
template <class T>
FC_DEVICE Tap<T> tap_of(const Conv2dProblem& a, const Divisors& by, const T* x, uint32_t column, uint32_t elements) {
  if (column >= elements) return {x, INT32_MIN, 0, column == elements && a.epilogue.bias};
  const int64_t c = by.c.take(column), s = by.s.take(column);
  return {x + c * a.x.c, column * a.dilation_h - a.pad_top, s * a.dilation_w - a.pad_left, false};
}

// --- multiply: kTaps taps of one filter over every step-th pixel of begin .. end.
template <class T>
FC_DEVICE void multiply(const Conv2dProblem& a, const Divisors& by, const Tap<T> (&taps)[kTaps], const T* y, uint32_t begin,
                        uint32_t end, uint32_t step, float (&sum)[kTaps]) {
  for (uint32_t i = begin; i < end; i += step) {
    uint32_t n = i;
    const int64_t q = by.q.take(n), p = by.p.take(n);
    const float gradient = to_float(y[n * a.y.n + p * a.y.h + q * a.y.w]);
    FC_UNROLL
    for (int t = 0; t < kTaps; ++t) {
      const int64_t h = taps[t].top + p * a.stride_h, w = taps[t].left + q * a.stride_w;
      if (taps[t].one) {
        sum[t] += gradient;
      } else if (h >= 0 && h < a.H && w >= 0 && w < a.W) {
        sum[t] = fmaf(to_float(taps[t].x[n * a.x.n + h * a.x.h + w * a.x.w]), gradient, sum[t]);
      }
    }
  }
}

// --- run: one block is `lanes` filters of one part. The threads of a filter are added in order.
template <class T>
__global__ void __launch_bounds__(kThreads)
    depthwise(Conv2dProblem a, Divisors by, Split cut, uint32_t pixels, uint32_t columns, const T* x, const T* y, float* parts) {
  Shared& shared = shared_memory<Shared>();
  uint32_t block = blockIdx.x;
  const uint32_t part = by.parts.take(block), lane = threadIdx.x % uint32_t(cut.lanes), first = threadIdx.x / uint32_t(cut.lanes);
  const uint32_t begin = part * cut.part, rest = pixels - begin, end = begin + (rest < cut.part ? rest : cut.part);
  const uint32_t step = kThreads / uint32_t(cut.lanes), k = block * uint32_t(cut.lanes) + lane;
  const bool exists = k < a.K;
  uint32_t g = exists ? k : 0;
  by.filters.take(g);
  for (uint32_t column = 0; column < columns; column += kTaps) {
    Tap<T> taps[kTaps];
    float sum[kTaps] = {};
    FC_UNROLL
    for (int t = 0; t < kTaps; ++t) {
      taps[t] = tap_of(a, by, x + g * (a.C / a.groups) * a.x.c, column + uint32_t(t), columns - (a.epilogue.bias ? 1 : 0));
    }
    if (exists) multiply(a, by, taps, y + k * a.y.c, begin + first, end, step, sum);
    FC_UNROLL
    for (int t = 0; t < kTaps; ++t) shared.sums[t][threadIdx.x] = sum[t];
    __syncthreads();
    // One thread for each filter and tap.
    for (uint32_t i = threadIdx.x; i < uint32_t(kTaps * cut.lanes); i += kThreads) {
      const uint32_t t = i / uint32_t(cut.lanes), filter = i % uint32_t(cut.lanes), at = block * uint32_t(cut.lanes) + filter;
      if (at >= a.K || column + t >= columns) continue;
      float total = 0;
      for (uint32_t chain = 0; chain < step; chain += kChain) {
        float sum_of_chain = 0;
        for (uint32_t j = chain; j < chain + kChain; ++j) sum_of_chain += shared.sums[t][j * uint32_t(cut.lanes) + filter];
        total += sum_of_chain;
      }
      parts[(int64_t(part) * a.K + at) * columns + column + t] = total;
    }
    __syncthreads();  // the next taps overwrite these sums
  }
}

template <class T>
void run(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context) {
  const Split cut = split(a);
  const int64_t pixels = a.N * a.P * a.Q, parts = ceil_div(pixels, cut.part), columns = filter_columns(a);
  const Divisors by = {
      Divisor::by(a.P),  Divisor::by(a.Q), Divisor::by(a.C / a.groups), Divisor::by(a.S), Divisor::by(a.K / a.groups),
      Divisor::by(parts)};
  launch(context, depthwise<T>, parts * ceil_div(a.K, cut.lanes), kThreads, sizeof(Shared), a, by, cut, uint32_t(pixels),
         uint32_t(columns), static_cast<const T*>(args.x), static_cast<const T*>(args.y), static_cast<float*>(context.workspace));
  add_parts<T>(a, args, context, parts);
}

// --- contract
constexpr int kMostChannels = 4;

const char* reject(const Conv2dProblem& a) {
  if (a.groups == 1 || a.C / a.groups > kMostChannels)
    return "a group has more than 4 input channels, or there is one group only";
  return parts_reject(a);
}

// As conv2d_fwd.depthwise.
template <class T>
double cost(const Conv2dProblem& a, const Machine&) {
  const double bytes = sizeof(T) * double(a.N) * double(a.C * a.H * a.W + a.K * a.P * a.Q);
  return bytes / 2e12 + conv2d_flops(a) / 2e12;
}

int64_t workspace(const Conv2dProblem& a, const Machine&) { return parts_bytes(a, ceil_div(a.N * a.P * a.Q, split(a).part)); }

template <class T>
constexpr Kernel<Conv2dProblem> kKernel = {1.0f, reject, cost<T>, workspace, run<T>};

}  // namespace

extern constinit const Kernel<Conv2dProblem> conv2d_wgrad_depthwise_f32 = kKernel<float>;
extern constinit const Kernel<Conv2dProblem> conv2d_wgrad_depthwise_f16 = kKernel<__half>;
extern constinit const Kernel<Conv2dProblem> conv2d_wgrad_depthwise_bf16 = kKernel<__nv_bfloat16>;

}  // namespace fastconv::sm80

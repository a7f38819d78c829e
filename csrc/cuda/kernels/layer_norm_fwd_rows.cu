// layer_norm_fwd.rows: a warp for each row, in three passes over it, the second and third of which find it in a cache.
//
// As on the CPU, the variance is a sum of squared distances from the mean and not a difference of two averages, which cancels;
// and the distances are summed too, whose average is what rounding left out of the mean.
#include "cuda/blocks/norm.h"

namespace fastconv::sm80 {
namespace {

template <class T>
struct Operands {
  const T *x, *residual, *gamma, *beta;
  T *sum, *y;
  float *mean, *rstd;
};

// --- run
template <class T>
__global__ void __launch_bounds__(kNormThreads) normalise(NormProblem a, Operands<T> args, bool wide) {
  const int64_t n = norm_row(), C = a.C;
  if (n >= a.N) return;
  const T* s = args.x + n * C;
  float total = 0;
  // What is added is normalised as it is stored: a backward pass sees nothing else. A lane reads again what it has written
  // itself.
  if (args.residual) {
    for_packs<T>(C, [&](int64_t c) {
      Pack<float, kWide<T>> here = load_numbers(s, c, C, wide);
      const Pack<float, kWide<T>> more = load_numbers(args.residual + n * C, c, C, wide);
      FC_UNROLL
      for (int i = 0; i < kWide<T>; ++i) {
        here.v[i] = to_float(from_float<T>(here.v[i] + more.v[i]));
        total += here.v[i];
      }
      store_numbers(args.sum + n * C, c, C, wide, here);
    });
    s = args.sum + n * C;
  } else {
    for_packs<T>(C, [&](int64_t c) {
      const Pack<float, kWide<T>> here = load_numbers(s, c, C, wide);
      FC_UNROLL
      for (int i = 0; i < kWide<T>; ++i) total += here.v[i];
    });
  }
  const float mean = add_lanes(total) / float(C);
  float distances = 0, squares = 0;
  for_packs<T>(C, [&](int64_t c) {
    const Pack<float, kWide<T>> here = load_numbers(s, c, C, wide);
    FC_UNROLL
    for (int i = 0; i < kWide<T>; ++i) {
      const float d = c + i < C ? here.v[i] - mean : 0.0f;
      distances += d;
      squares = fmaf(d, d, squares);
    }
  });
  const float rest = add_lanes(distances) / float(C), variance = add_lanes(squares) / float(C) - rest * rest;
  // A variance of NaN has to stay one.
  const float rstd = 1 / sqrtf((variance < 0 ? 0 : variance) + float(a.eps));
  for_packs<T>(C, [&](int64_t c) {
    Pack<float, kWide<T>> here = load_numbers(s, c, C, wide);
    FC_UNROLL
    for (int i = 0; i < kWide<T>; ++i) here.v[i] = ((here.v[i] - mean) - rest) * rstd;
    if (args.gamma) {
      const Pack<float, kWide<T>> gamma = load_numbers(args.gamma, c, C, wide);
      FC_UNROLL
      for (int i = 0; i < kWide<T>; ++i) here.v[i] *= gamma.v[i];
    }
    if (args.beta) {
      const Pack<float, kWide<T>> beta = load_numbers(args.beta, c, C, wide);
      FC_UNROLL
      for (int i = 0; i < kWide<T>; ++i) here.v[i] += beta.v[i];
    }
    store_numbers(args.y + n * C, c, C, wide, here);
  });
  if (!args.mean || threadIdx.x % kWarp != 0) return;
  args.mean[n] = mean + rest;
  args.rstd[n] = rstd;
}

template <class T>
void run(const NormProblem& a, const NormArgs& args, const Context& context) {
  const auto of = [](void* p) { return static_cast<T*>(p); };
  const Operands<T> operands = {of(args.x),
                                of(args.residual),
                                of(args.gamma),
                                of(args.beta),
                                of(args.sum),
                                of(args.y),
                                static_cast<float*>(args.mean),
                                static_cast<float*>(args.rstd)};
  const bool wide =
      norm_is_wide<T>(a, {args.x, args.residual, args.gamma, args.beta, args.residual ? args.sum : nullptr, args.y});
  launch(context, normalise<T>, norm_blocks(a), kNormThreads, 0, a, operands, wide);
}

// --- contract
int64_t workspace(const NormProblem&, const Machine&) { return 0; }

template <class T>
constexpr Kernel<NormProblem> kKernel = {1.0f, norm_reject, norm_cost<T, 2>, workspace, run<T>};

}  // namespace

extern constinit const Kernel<NormProblem> layer_norm_fwd_rows_f32 = kKernel<float>;
extern constinit const Kernel<NormProblem> layer_norm_fwd_rows_f16 = kKernel<__half>;
extern constinit const Kernel<NormProblem> layer_norm_fwd_rows_bf16 = kKernel<__nv_bfloat16>;

}  // namespace fastconv::sm80

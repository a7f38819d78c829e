// conv2d_wgrad.pointwise: the gradient of 1x1 filters, and of Linear's weight: y transposed times x.
//
//   tile       blocks/gemm_tile.h        6 filters x 64 channels of one tap in registers (AVX-512), 4 x 24 (AVX2)
//   transform  blocks/filter_gradient.cpp  a chunk of at most 512 pixels of x and y at a time, in L2
//   multiply   blocks/gemm_tile.cpp
//   run        blocks/filter_gradient.cpp  blocks of filters, then chunks of pixels, then taps and panels of channels
#include "cpu/blocks/conv2d_geometry.h"
#include "cpu/blocks/filter_gradient.h"
#include "cpu/simd/half.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- contract
const char* reject(const Conv2dProblem& a) { return a.R * a.S == 1 ? nullptr : "the filters are larger than 1x1"; }

template <class T>
double cost(const Conv2dProblem& a, const Machine& machine) {
  return conv2d_flops(a) / (peak_flops<compute_t<T>>(machine) * filter_gradient_efficiency<T>(a));
}

template <class T>
constexpr Kernel<Conv2dProblem> kKernel = {1.0f, reject, cost<T>, filter_gradient_workspace<T>, filter_gradient_run<T>};

}  // namespace

extern constinit const Kernel<Conv2dProblem> conv2d_wgrad_pointwise_f32 = kKernel<float>;
extern constinit const Kernel<Conv2dProblem> conv2d_wgrad_pointwise_f64 = kKernel<double>;
extern constinit const Kernel<Conv2dProblem> conv2d_wgrad_pointwise_bf16 = kKernel<bf16>;
extern constinit const Kernel<Conv2dProblem> conv2d_wgrad_pointwise_f16 = kKernel<f16>;

}  // namespace fastconv::FASTCONV_TARGET

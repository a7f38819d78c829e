// conv2d_wgrad.im2col: the gradient of the filters as a matrix multiplication over pixels, a block of the column matrix at a
// time. Takes every problem with filters larger than 1x1, in either layout.
//
//   tile       blocks/gemm_tile.h        6 filters x 64 channels of one tap in registers (AVX-512), 4 x 24 (AVX2)
//   transform  blocks/filter_gradient.cpp  a chunk of at most 512 pixels of x and y at a time, in L2
//   multiply   blocks/gemm_tile.cpp
//   run        blocks/filter_gradient.cpp  blocks of filters, then chunks of pixels, then taps and panels of channels
#include "cpu/blocks/conv2d_geometry.h"
#include "cpu/blocks/filter_gradient.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- contract
const char* reject(const Conv2dProblem& a) { return a.R * a.S == 1 ? "the filters are 1x1, which is pointwise" : nullptr; }

template <class T>
double cost(const Conv2dProblem& a, const Machine& machine) {
  return conv2d_flops(a) / (peak_flops<T>(machine) * filter_gradient_efficiency<T>(a));
}

template <class T>
constexpr Kernel<Conv2dProblem> kKernel = {1.0f, reject, cost<T>, filter_gradient_workspace<T>, filter_gradient_run<T>};

}  // namespace

extern constinit const Kernel<Conv2dProblem> conv2d_wgrad_im2col_f32 = kKernel<float>;
extern constinit const Kernel<Conv2dProblem> conv2d_wgrad_im2col_f64 = kKernel<double>;

}  // namespace fastconv::FASTCONV_TARGET

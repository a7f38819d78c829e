// conv2d_dgrad.implicit_gemm: the input gradient in channels_last, as forward convolutions by phases (blocks/input_gradient.h)
// whose rows are pixels (blocks/pixel_rows.h). Transposed convolution is the same op.
#include "cpu/blocks/input_gradient.h"
#include "cpu/blocks/pixel_rows.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- contract
const char* reject(const Conv2dProblem& a) {
  if (a.R * a.S == 1) return "the filters are 1x1, which is pointwise";
  return input_gradient_reject<pixel_rows_reject>(a);
}

template <class T>
double phase_cost(const Conv2dProblem& a, const Machine& machine) {
  return conv2d_flops(a) / (peak_flops<T>(machine) * pixel_rows_efficiency<T>(a));
}

template <class T>
constexpr Kernel<Conv2dProblem> kKernel = {1.0f, reject, input_gradient_cost<phase_cost<T>>,
                                           input_gradient_workspace<pixel_rows_workspace<T>>,
                                           input_gradient_run<T, pixel_rows_run<T>>};

}  // namespace

extern constinit const Kernel<Conv2dProblem> conv2d_dgrad_implicit_gemm_f32 = kKernel<float>;
extern constinit const Kernel<Conv2dProblem> conv2d_dgrad_implicit_gemm_f64 = kKernel<double>;

}  // namespace fastconv::FASTCONV_TARGET

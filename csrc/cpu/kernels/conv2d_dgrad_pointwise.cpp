// conv2d_dgrad.pointwise: the input gradient of 1x1 filters, which is a matrix multiplication by the transposed filters; with a
// stride all but one of the phases are zeros. NCHW comes and goes through a stage (blocks/pixel_images.h), for wide layers.
// Linear's input gradient is the same.
#include "cpu/blocks/half_rows.h"
#include "cpu/blocks/pixel_images.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- contract
const char* reject(const Conv2dProblem& a) {
  if (a.R * a.S != 1) return "the filters are larger than 1x1";
  return pixel_images_reject(a);
}

template <class T>
constexpr Kernel<Conv2dProblem> kKernel = {1.0f, reject, pixel_gradient_cost<T>, pixel_gradient_workspace<T>,
                                           pixel_gradient_run<T>};

template <class S>
constexpr Kernel<Conv2dProblem> kHalves = {1.0f, half_rows_reject, input_gradient_cost<pixel_rows_cost<float>>,
                                           input_gradient_workspace<half_rows_workspace<S>>,
                                           input_gradient_run<S, half_rows_run<S>>};

}  // namespace

extern constinit const Kernel<Conv2dProblem> conv2d_dgrad_pointwise_f32 = kKernel<float>;
extern constinit const Kernel<Conv2dProblem> conv2d_dgrad_pointwise_f64 = kKernel<double>;
extern constinit const Kernel<Conv2dProblem> conv2d_dgrad_pointwise_bf16 = kHalves<bf16>;
extern constinit const Kernel<Conv2dProblem> conv2d_dgrad_pointwise_f16 = kHalves<f16>;

}  // namespace fastconv::FASTCONV_TARGET

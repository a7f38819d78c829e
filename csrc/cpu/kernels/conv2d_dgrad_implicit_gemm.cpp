// conv2d_dgrad.implicit_gemm: the input gradient in channels_last, as forward convolutions by phases (blocks/input_gradient.h)
// whose rows are pixels (blocks/pixel_rows.h). Transposed convolution is the same op. NCHW comes and goes through a stage
// (blocks/pixel_images.h), where phases of a stride would write single elements.
#include "cpu/blocks/pixel_images.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- contract
const char* reject(const Conv2dProblem& a) {
  if (a.R * a.S == 1) return "the filters are 1x1, which is pointwise";
  return pixel_images_reject(a);
}

template <class T>
double cost(const Conv2dProblem& a, const Machine& machine) {
  const double seconds = pixel_gradient_cost<T>(a, machine);
  if (over_pixels(a)) return seconds;
  // A phase of every part packs its filters and begins anew: of 1024 with a stride of 32 that takes longer than their products.
  const double phases = double(ImageStage<T>(a, true, machine.threads).parts()) * double(a.stride_h * a.stride_w);
  return seconds + 20e-6 * phases / machine.threads;
}

template <class T>
constexpr Kernel<Conv2dProblem> kKernel = {1.0f, reject, cost<T>, pixel_gradient_workspace<T>, pixel_gradient_run<T>};

}  // namespace

extern constinit const Kernel<Conv2dProblem> conv2d_dgrad_implicit_gemm_f32 = kKernel<float>;
extern constinit const Kernel<Conv2dProblem> conv2d_dgrad_implicit_gemm_f64 = kKernel<double>;

}  // namespace fastconv::FASTCONV_TARGET

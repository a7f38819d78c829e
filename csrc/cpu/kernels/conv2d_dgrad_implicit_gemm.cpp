// conv2d_dgrad.implicit_gemm: the input gradient in channels_last, as forward convolutions by phases (blocks/input_gradient.h)
// whose rows are pixels (blocks/pixel_rows.h). Transposed convolution is the same op. NCHW comes and goes through a stage
// (blocks/image_stage.h), where phases of a stride would write single elements.
#include "cpu/blocks/image_stage.h"
#include "cpu/blocks/input_gradient.h"
#include "cpu/blocks/pixel_rows.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

bool channels_last(const Conv2dProblem& a) { return a.x.c == 1 && a.y.c == 1; }

// --- run, channels_last and NCHW
template <class T>
void run_pixels(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context) {
  input_gradient_run<T, pixel_rows_run<T>>(a, args, context);
}

template <class T>
int64_t pixels_workspace(const Conv2dProblem& a, const Machine& machine) {
  return input_gradient_workspace<pixel_rows_workspace<T>>(a, machine);
}

template <class T>
void run(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context) {
  if (channels_last(a)) return run_pixels<T>(a, args, context);
  image_stage_run<T, true, run_pixels<T>, pixels_workspace<T>>(a, args, context);
}

// --- contract
const char* reject(const Conv2dProblem& a) {
  if (a.R * a.S == 1) return "the filters are 1x1, which is pointwise";
  if (!channels_last(a) && !over_planes(a)) return "neither the channels nor the columns are contiguous in both x and y";
  return nullptr;
}

template <class T>
double phase_cost(const Conv2dProblem& a, const Machine& machine) {
  return conv2d_flops(a) / (peak_flops<T>(machine) * pixel_rows_efficiency<T>(a));
}

template <class T>
double cost(const Conv2dProblem& a, const Machine& machine) {
  if (channels_last(a)) return input_gradient_cost<phase_cost<T>>(a, machine);
  // A phase of every part packs its filters and begins anew: of 1024 with a stride of 32 that takes longer than their products.
  const double phases = double(ImageStage<T>(a, true, machine.threads).parts()) * double(a.stride_h * a.stride_w);
  return image_stage_cost<T, true, input_gradient_cost<phase_cost<T>>>(a, machine) + 20e-6 * phases / machine.threads;
}

template <class T>
int64_t workspace(const Conv2dProblem& a, const Machine& machine) {
  return channels_last(a) ? pixels_workspace<T>(a, machine) : image_stage_workspace<T, true, pixels_workspace<T>>(a, machine);
}

template <class T>
constexpr Kernel<Conv2dProblem> kKernel = {1.0f, reject, cost<T>, workspace<T>, run<T>};

}  // namespace

extern constinit const Kernel<Conv2dProblem> conv2d_dgrad_implicit_gemm_f32 = kKernel<float>;
extern constinit const Kernel<Conv2dProblem> conv2d_dgrad_implicit_gemm_f64 = kKernel<double>;

}  // namespace fastconv::FASTCONV_TARGET

// conv2d_dgrad.pointwise: the input gradient of 1x1 filters, which is a matrix multiplication by the transposed filters; with a
// stride all but one of the phases are zeros. Linear's input gradient is the same.
#include "cpu/blocks/filter_rows.h"
#include "cpu/blocks/half_rows.h"
#include "cpu/blocks/input_gradient.h"
#include "cpu/blocks/pixel_rows.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

bool channels_last(const Conv2dProblem& a) { return a.x.c == 1 && a.y.c == 1; }
bool planes(const Conv2dProblem& a) { return a.x.w == 1 && a.y.w == 1; }

// --- run: one phase, in forward terms
template <class T>
void run_phase(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context) {
  channels_last(a) ? pixel_rows_run<T>(a, args, context) : filter_rows_run<T>(a, args, context);
}

// --- contract
const char* reject(const Conv2dProblem& a) {
  if (a.R * a.S != 1) return "the filters are larger than 1x1";
  if (!channels_last(a) && !planes(a)) return "neither the channels nor the columns are contiguous in both x and y";
  return nullptr;
}

template <class T>
double phase_cost(const Conv2dProblem& a, const Machine& machine) {
  // A percent better than im2col, which takes the same NCHW problems through the same code.
  const double efficiency = channels_last(a) ? pixel_rows_efficiency<T>(a) : 1.01 * filter_rows_efficiency<T>(a);
  return conv2d_flops(a) / (peak_flops<T>(machine) * efficiency);
}

template <class T>
int64_t phase_workspace(const Conv2dProblem& a, const Machine& machine) {
  return channels_last(a) ? pixel_rows_workspace<T>(a, machine) : filter_rows_workspace<T>(a, machine);
}

template <class T>
constexpr Kernel<Conv2dProblem> kKernel = {1.0f, reject, input_gradient_cost<phase_cost<T>>,
                                           input_gradient_workspace<phase_workspace<T>>, input_gradient_run<T, run_phase<T>>};

template <class S>
constexpr Kernel<Conv2dProblem> kHalves = {1.0f, half_rows_reject, input_gradient_cost<phase_cost<float>>,
                                           input_gradient_workspace<half_rows_workspace<S>>,
                                           input_gradient_run<S, half_rows_run<S>>};

}  // namespace

extern constinit const Kernel<Conv2dProblem> conv2d_dgrad_pointwise_f32 = kKernel<float>;
extern constinit const Kernel<Conv2dProblem> conv2d_dgrad_pointwise_f64 = kKernel<double>;
extern constinit const Kernel<Conv2dProblem> conv2d_dgrad_pointwise_bf16 = kHalves<bf16>;
extern constinit const Kernel<Conv2dProblem> conv2d_dgrad_pointwise_f16 = kHalves<f16>;

}  // namespace fastconv::FASTCONV_TARGET

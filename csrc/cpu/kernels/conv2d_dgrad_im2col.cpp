// conv2d_dgrad.im2col: the input gradient in NCHW, as forward convolutions by phases (blocks/input_gradient.h) whose rows are
// filters (blocks/filter_rows.h). Takes every problem.
#include "cpu/blocks/filter_rows.h"
#include "cpu/blocks/input_gradient.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- contract
const char* reject(const Conv2dProblem&) { return nullptr; }

template <class T>
double phase_cost(const Conv2dProblem& a, const Machine& machine) {
  return conv2d_flops(a) / (peak_flops<T>(machine) * filter_rows_efficiency<T>(a));
}

template <class T>
constexpr Kernel<Conv2dProblem> kKernel = {1.0f, reject, input_gradient_cost<phase_cost<T>>,
                                           input_gradient_workspace<filter_rows_workspace<T>>,
                                           input_gradient_run<T, filter_rows_run<T>>};

}  // namespace

extern constinit const Kernel<Conv2dProblem> conv2d_dgrad_im2col_f32 = kKernel<float>;
extern constinit const Kernel<Conv2dProblem> conv2d_dgrad_im2col_f64 = kKernel<double>;

}  // namespace fastconv::FASTCONV_TARGET

// conv2d_dgrad.depthwise: the input gradient as depthwise forward convolutions by phases (blocks/input_gradient.h), on the loops
// of conv2d_fwd.depthwise. With more than one filter in a group the phases would sum over them, which depthwise does not.
#include "cpu/blocks/depthwise.h"
#include "cpu/blocks/input_gradient.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- contract
const char* reject(const Conv2dProblem& a) {
  return a.C == a.groups && a.K == a.groups ? nullptr
                                            : "depthwise takes one input channel and one filter for each "
                                              "group";
}

template <class T>
constexpr Kernel<Conv2dProblem> kKernel = {1.0f, reject, input_gradient_cost<depthwise_cost<T>>,
                                           input_gradient_workspace<depthwise_workspace<T>>,
                                           input_gradient_run<T, depthwise_run<T>>};

}  // namespace

extern constinit const Kernel<Conv2dProblem> conv2d_dgrad_depthwise_f32 = kKernel<float>;
extern constinit const Kernel<Conv2dProblem> conv2d_dgrad_depthwise_f64 = kKernel<double>;

}  // namespace fastconv::FASTCONV_TARGET

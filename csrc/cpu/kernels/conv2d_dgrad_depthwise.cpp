// conv2d_dgrad.depthwise: the input gradient as depthwise forward convolutions by phases (blocks/input_gradient.h), on the loops
// of conv2d_fwd.depthwise. With more than one filter in a group the phases sum over them, which is conv2d_dgrad.grouped.
#include "cpu/blocks/depthwise.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- run
template <class T>
void run(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context) {
  !depthwise_over_channels(a) && depthwise_by_stage(a, true) ? depthwise_planes_run<T, true>(a, args, context)
                                                             : input_gradient_run<T, depthwise_run<T>>(a, args, context);
}

// --- contract
const char* reject(const Conv2dProblem& a) {
  return a.C == a.groups && a.K == a.groups ? nullptr : "depthwise takes one input channel and one filter for each group";
}

template <class T>
int64_t workspace(const Conv2dProblem& a, const Machine& machine) {
  return !depthwise_over_channels(a) && depthwise_by_stage(a, true)
             ? depthwise_planes_workspace<T, true>(a, machine)
             : input_gradient_workspace<depthwise_workspace<T>>(a, machine);
}

template <class T>
constexpr Kernel<Conv2dProblem> kKernel = {1.0f, reject, depthwise_cost<T>, workspace<T>, run<T>};

}  // namespace

extern constinit const Kernel<Conv2dProblem> conv2d_dgrad_depthwise_f32 = kKernel<float>;
extern constinit const Kernel<Conv2dProblem> conv2d_dgrad_depthwise_f64 = kKernel<double>;

}  // namespace fastconv::FASTCONV_TARGET

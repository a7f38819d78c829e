// conv2d_wgrad.depthwise: one input channel for each group, so the gradient of a filter is R*S dot products of two planes. The
// loops are blocks/depthwise_wgrad_channels.cpp (NHWC, and planes by way of it) and blocks/depthwise_wgrad_rows.cpp.
#include "cpu/blocks/depthwise.h"
#include "cpu/blocks/depthwise_wgrad.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- run
template <class T>
void run(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context) {
  if (depthwise_over_channels(a)) return depthwise_wgrad_channels_run<T>(a, args, context);
  depthwise_by_stage(a, false) ? depthwise_wgrad_planes_run<T>(a, args, context) : depthwise_wgrad_rows_run<T>(a, args, context);
}

// --- contract
template <class T>
int64_t workspace(const Conv2dProblem& a, const Machine& machine) {
  if (depthwise_over_channels(a)) return depthwise_wgrad_channels_workspace<T>(a, machine);
  return depthwise_by_stage(a, false) ? depthwise_wgrad_planes_workspace<T>(a, machine)
                                      : depthwise_wgrad_rows_workspace<T>(a, machine);
}

template <class T>
constexpr Kernel<Conv2dProblem> kKernel = {1.0f, depthwise_reject, depthwise_cost<T>, workspace<T>, run<T>};

}  // namespace

extern constinit const Kernel<Conv2dProblem> conv2d_wgrad_depthwise_f32 = kKernel<float>;
extern constinit const Kernel<Conv2dProblem> conv2d_wgrad_depthwise_f64 = kKernel<double>;

}  // namespace fastconv::FASTCONV_TARGET

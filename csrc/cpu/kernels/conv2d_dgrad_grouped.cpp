// conv2d_dgrad.grouped: the input gradient of groups of a few channels, and of depthwise convolutions with several filters for
// each channel, as forward convolutions by phases (blocks/input_gradient.h) on the loops of conv2d_fwd.grouped.
#include "cpu/blocks/depthwise.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- run
template <class T>
void run(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context) {
  depthwise_over_channels(a) ? depthwise_channels_dgrad<T>(a, args, context) : depthwise_planes_run<T, true>(a, args, context);
}

// --- contract
const char* reject(const Conv2dProblem& a) {
  return a.C == a.groups && a.K == a.groups ? "one input channel and one filter for each group is depthwise" : grouped_reject(a);
}

template <class T>
int64_t workspace(const Conv2dProblem& a, const Machine& machine) {
  return depthwise_over_channels(a) ? depthwise_channels_dgrad_workspace<T>(a, machine)
                                    : depthwise_planes_workspace<T, true>(a, machine);
}

template <class T>
constexpr Kernel<Conv2dProblem> kKernel = {1.0f, reject, grouped_cost<T, false>, workspace<T>, run<T>};

}  // namespace

extern constinit const Kernel<Conv2dProblem> conv2d_dgrad_grouped_f32 = kKernel<float>;
extern constinit const Kernel<Conv2dProblem> conv2d_dgrad_grouped_f64 = kKernel<double>;

}  // namespace fastconv::FASTCONV_TARGET

// conv2d_wgrad.grouped: the weight gradient of groups of a few channels, on the loops of conv2d_wgrad.depthwise: one input of all
// filters of a vector after the other.
#include "cpu/blocks/depthwise.h"
#include "cpu/blocks/depthwise_wgrad.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- run
template <class T>
void run(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context) {
  depthwise_over_channels(a) ? depthwise_wgrad_channels_run<T>(a, args, context)
                             : depthwise_wgrad_planes_run<T>(a, args, context);
}

// --- contract
const char* reject(const Conv2dProblem& a) {
  return a.C == a.groups ? "one input channel for each group is depthwise" : grouped_reject(a);
}

template <class T>
int64_t workspace(const Conv2dProblem& a, const Machine& machine) {
  return depthwise_over_channels(a) ? depthwise_wgrad_channels_workspace<T>(a, machine)
                                    : depthwise_wgrad_planes_workspace<T>(a, machine);
}

template <class T>
constexpr Kernel<Conv2dProblem> kKernel = {1.0f, reject, grouped_cost<T, true>, workspace<T>, run<T>};

}  // namespace

extern constinit const Kernel<Conv2dProblem> conv2d_wgrad_grouped_f32 = kKernel<float>;
extern constinit const Kernel<Conv2dProblem> conv2d_wgrad_grouped_f64 = kKernel<double>;

}  // namespace fastconv::FASTCONV_TARGET

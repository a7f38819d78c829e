// conv2d_fwd.grouped: groups of a few channels, whose filters are too few for the columns of a matrix multiplication. Lanes are
// the filters of several groups, each with its own group's channels (blocks/channel_lines.h); otherwise it is
// conv2d_fwd.depthwise.
#include "cpu/blocks/depthwise.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- run
template <class T>
void run(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context) {
  depthwise_over_channels(a) ? depthwise_channels_run<T>(a, args, context) : depthwise_planes_run<T, false>(a, args, context);
}

// --- contract
const char* reject(const Conv2dProblem& a) {
  return a.C == a.groups ? "one input channel for each group is depthwise" : grouped_reject(a);
}

template <class T>
int64_t workspace(const Conv2dProblem& a, const Machine& machine) {
  return depthwise_over_channels(a) ? depthwise_channels_workspace<T>(a, machine)
                                    : depthwise_planes_workspace<T, false>(a, machine);
}

template <class T>
constexpr Kernel<Conv2dProblem> kKernel = {1.0f, reject, grouped_cost<T, false>, workspace<T>, run<T>};

}  // namespace

extern constinit const Kernel<Conv2dProblem> conv2d_fwd_grouped_f32 = kKernel<float>;
extern constinit const Kernel<Conv2dProblem> conv2d_fwd_grouped_f64 = kKernel<double>;

}  // namespace fastconv::FASTCONV_TARGET

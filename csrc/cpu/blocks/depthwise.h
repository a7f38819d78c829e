// The depthwise forward convolution (C == groups), which is also the depthwise input gradient when its phases are asked of it.
//
// Two loop nests: vectors over channels where channels are contiguous (depthwise_channels.cpp), vectors along the row elsewhere
// (depthwise_rows.cpp). K / groups may be any multiplier.
#pragma once

#include "cpu/blocks/conv2d_geometry.h"

namespace fastconv::FASTCONV_TARGET {

FC_INLINE bool depthwise_over_channels(const Conv2dProblem& a) { return a.x.c == 1 && a.y.c == 1; }

FC_INLINE const char* depthwise_reject(const Conv2dProblem& a) {
  return a.C == a.groups ? nullptr : "depthwise takes one input channel for each group";
}

template <class T>
void depthwise_channels_run(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context);
template <class T>
int64_t depthwise_channels_workspace(const Conv2dProblem& a, const Machine& machine);
template <class T>
void depthwise_rows_run(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context);
template <class T>
int64_t depthwise_rows_workspace(const Conv2dProblem& a, const Machine& machine);

extern template void depthwise_channels_run<float>(const Conv2dProblem&, const Conv2dArgs&, const Context&);
extern template void depthwise_channels_run<double>(const Conv2dProblem&, const Conv2dArgs&, const Context&);
extern template int64_t depthwise_channels_workspace<float>(const Conv2dProblem&, const Machine&);
extern template int64_t depthwise_channels_workspace<double>(const Conv2dProblem&, const Machine&);
extern template void depthwise_rows_run<float>(const Conv2dProblem&, const Conv2dArgs&, const Context&);
extern template void depthwise_rows_run<double>(const Conv2dProblem&, const Conv2dArgs&, const Context&);
extern template int64_t depthwise_rows_workspace<float>(const Conv2dProblem&, const Machine&);
extern template int64_t depthwise_rows_workspace<double>(const Conv2dProblem&, const Machine&);

template <class T>
void depthwise_run(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context) {
  depthwise_over_channels(a) ? depthwise_channels_run<T>(a, args, context) : depthwise_rows_run<T>(a, args, context);
}
template <class T>
int64_t depthwise_workspace(const Conv2dProblem& a, const Machine& machine) {
  return depthwise_over_channels(a) ? depthwise_channels_workspace<T>(a, machine) : depthwise_rows_workspace<T>(a, machine);
}

// Seconds. Compute and memory traffic add up, because the large layers stream from L3 and the small ones do not.
template <class T>
double depthwise_cost(const Conv2dProblem& a, const Machine& machine) {
  const double x_bytes = double(a.N) * double(a.C) * double(a.H) * double(a.W) * sizeof(T);
  const double y_bytes = double(a.N) * double(a.K) * double(a.P) * double(a.Q) * sizeof(T);
  double efficiency = 0.5;
  if (!depthwise_over_channels(a)) {
    const double lanes = kLanes<T>, filled = double(a.Q) / (lanes * double((a.Q + kLanes<T> - 1) / kLanes<T>));
    efficiency *= a.x.w == 1 && a.y.w == 1 ? filled : 0.2 * filled;
  }
  return conv2d_flops(a) / (peak_flops<T>(machine) * efficiency) + (x_bytes + y_bytes) / 10e9;
}

}  // namespace fastconv::FASTCONV_TARGET

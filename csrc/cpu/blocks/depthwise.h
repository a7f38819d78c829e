// The depthwise and grouped forward convolution, whose groups are too small for a matrix multiplication; also their input
// gradient, when its phases are asked of it.
//
// Three loop nests: vectors over channels where channels are contiguous (depthwise_channels.cpp), for any number of channels in a
// group; the same on pixels where they lie (depthwise_pixels.cpp), for small filters; and vectors along the row
// (depthwise_rows.cpp), for one channel in a group and any strides. Planes go through the first two by way of pixel_stage.h where
// that is faster.
#pragma once

#include "cpu/blocks/conv2d_geometry.h"
#include "cpu/blocks/input_gradient.h"
#include "cpu/blocks/pixel_stage.h"

namespace fastconv::FASTCONV_TARGET {

FC_INLINE bool depthwise_over_channels(const Conv2dProblem& a) { return a.x.c == 1 && a.y.c == 1; }

FC_INLINE const char* depthwise_reject(const Conv2dProblem& a) {
  return a.C == a.groups ? nullptr : "depthwise takes one input channel for each group";
}

// A matrix multiplication is better long before; this bounds the scratch.
inline constexpr int64_t kMostGrouped = 64;

// Problems of groups with several channels or filters.
FC_INLINE const char* grouped_reject(const Conv2dProblem& a) {
  if (a.groups == 1) return "there is one group";
  if (a.R * a.S == 1) return "the filters are 1x1, which is pointwise";
  if (a.C > kMostGrouped * a.groups || a.K > kMostGrouped * a.groups) return "more than 64 channels or filters in a group";
  if (!depthwise_over_channels(a) && !over_planes(a))
    return "neither the channels nor the columns are contiguous in both x and y";
  return nullptr;
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

// Whether the pixels need not be copied.
template <class T>
bool depthwise_in_place(const Conv2dProblem& a);
template <class T>
void depthwise_pixels_run(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context);
template <class T>
int64_t depthwise_pixels_workspace(const Conv2dProblem& a, const Machine& machine);

extern template bool depthwise_in_place<float>(const Conv2dProblem&);
extern template bool depthwise_in_place<double>(const Conv2dProblem&);
extern template void depthwise_pixels_run<float>(const Conv2dProblem&, const Conv2dArgs&, const Context&);
extern template void depthwise_pixels_run<double>(const Conv2dProblem&, const Conv2dArgs&, const Context&);
extern template int64_t depthwise_pixels_workspace<float>(const Conv2dProblem&, const Machine&);
extern template int64_t depthwise_pixels_workspace<double>(const Conv2dProblem&, const Machine&);

// The input gradient in NHWC.
template <class T>
void depthwise_channels_dgrad(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context) {
  input_gradient_run<T, depthwise_channels_run<T>>(a, args, context);
}
template <class T>
int64_t depthwise_channels_dgrad_workspace(const Conv2dProblem& a, const Machine& machine) {
  return input_gradient_workspace<depthwise_channels_workspace<T>>(a, machine);
}

// Planes of any number of channels in a group.
template <class T, bool kInputGradient>
void depthwise_planes_run(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context) {
  if constexpr (kInputGradient) {
    staged_run<T, true, depthwise_channels_dgrad<T>, depthwise_channels_dgrad_workspace<T>>(a, args, context);
  } else {
    staged_run<T, false, depthwise_channels_run<T>, depthwise_channels_workspace<T>>(a, args, context);
  }
}
template <class T, bool kInputGradient>
int64_t depthwise_planes_workspace(const Conv2dProblem& a, const Machine& machine) {
  if constexpr (kInputGradient) {
    return staged_workspace<T, true, depthwise_channels_dgrad_workspace<T>>(a, machine);
  } else {
    return staged_workspace<T, false, depthwise_channels_workspace<T>>(a, machine);
  }
}

// Whether planes are better transposed than convolved along their rows. Those of 112 columns fill vectors along the row, and stay
// in L2 in parts only; along the row there are tiles for small dense filters only; and the input gradient of a stride writes
// every other column. 960 channels of 7x7 took 241 us along the row and 61 by way of NHWC, 144 of 56x56 357 and 397, 32 of
// 112x112 380 and 470.
FC_INLINE bool depthwise_by_stage(const Conv2dProblem& a, bool input_gradient) {
  const bool tile = a.dilation_h == 1 && a.R == a.S && (a.R == 3 || (a.stride_h == 1 && (a.R == 5 || a.R == 7)));
  return over_planes(a) && ((input_gradient ? a.W : a.Q) < 64 || !tile || (input_gradient && a.stride_w > 1));
}

template <class T>
void depthwise_run(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context) {
  if (depthwise_over_channels(a)) return depthwise_channels_run<T>(a, args, context);
  depthwise_by_stage(a, false) ? depthwise_planes_run<T, false>(a, args, context) : depthwise_rows_run<T>(a, args, context);
}
template <class T>
int64_t depthwise_workspace(const Conv2dProblem& a, const Machine& machine) {
  if (depthwise_over_channels(a)) return depthwise_channels_workspace<T>(a, machine);
  return depthwise_by_stage(a, false) ? depthwise_planes_workspace<T, false>(a, machine)
                                      : depthwise_rows_workspace<T>(a, machine);
}

// Seconds. Compute and memory traffic add up, because the large layers stream from L3 and the small ones do not.
template <class T>
double depthwise_cost(const Conv2dProblem& a, const Machine& machine) {
  // Of the rows between the taps nothing is read.
  const double rows_read = a.stride_h > a.R ? double(a.R) / double(a.stride_h) : 1;
  const double x_bytes = double(a.N) * double(a.C) * double(a.H) * double(a.W) * rows_read * sizeof(T);
  const double y_bytes = double(a.N) * double(a.K) * double(a.P) * double(a.Q) * sizeof(T);
  const bool in_place = depthwise_over_channels(a), rows = !in_place && !over_planes(a);
  // A transpose there and back costs about what the memory does.
  return conv2d_flops(a) / (peak_flops<T>(machine) * (rows ? 0.1 : 0.5)) + (x_bytes + y_bytes) / (in_place ? 15e9 : 8e9);
}

// As optimistic as the matrix multiplications are about small groups, which reach four tenths of what they predict. Every input
// of every filter written out (channel_lines.h) is a third as fast as inputs that are picked in registers.
template <class T, bool kWeightGradient>
double grouped_cost(const Conv2dProblem& a, const Machine& machine) {
  const int64_t inputs = a.C / a.groups;
  const bool in_registers = a.C == a.K && kLanes<T> % inputs == 0 && a.S <= 3;
  const double bytes = double(a.N) * double(a.C * a.H * a.W + a.K * a.P * a.Q) * sizeof(T);
  return conv2d_flops(a) / (peak_flops<T>(machine) * (in_registers ? (kWeightGradient ? 0.6 : 0.8) : 0.3)) +
         bytes / (depthwise_over_channels(a) ? 30e9 : 18e9);
}

}  // namespace fastconv::FASTCONV_TARGET

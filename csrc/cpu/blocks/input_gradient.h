// The input gradient as forward convolutions, phase by phase (core/input_phases.h): no kernel of its own.
#pragma once

#include "cpu/blocks/conv2d_geometry.h"
#include "cpu/simd/half.h"

#include "core/input_phases.h"

namespace fastconv::FASTCONV_TARGET {

// --- the four functions of a kernel, made from those of a forward kernel

// Writes the epilogue of nothing: x = activation(bias + residual) at every position of a phase without taps.
template <class T>
void fill_phase(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context);

extern template void fill_phase<float>(const Conv2dProblem&, const Conv2dArgs&, const Context&);
extern template void fill_phase<double>(const Conv2dProblem&, const Conv2dArgs&, const Context&);
extern template void fill_phase<bf16>(const Conv2dProblem&, const Conv2dArgs&, const Context&);
extern template void fill_phase<f16>(const Conv2dProblem&, const Conv2dArgs&, const Context&);

template <class T, auto kForward>
void input_gradient_run(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context) {
  for_each_phase(a, [&](const Conv2dProblem& b, int64_t w_offset, int64_t x_offset) {
    Conv2dArgs sub = args;
    sub.x = args.y;
    sub.y = static_cast<T*>(args.x) + x_offset;
    sub.residual = args.residual ? static_cast<T*>(args.residual) + x_offset : nullptr;
    if (b.R * b.S == 0) return fill_phase<T>(b, sub, context);
    sub.w = static_cast<T*>(args.w) + w_offset;
    kForward(b, sub, context);
  });
}

template <auto kForward>
int64_t input_gradient_workspace(const Conv2dProblem& a, const Machine& machine) {
  int64_t most = 0;
  for_each_phase(a, [&](const Conv2dProblem& b, int64_t, int64_t) {
    const int64_t bytes = b.R * b.S == 0 ? 0 : kForward(b, machine);
    most = bytes > most ? bytes : most;
  });
  return most;
}

template <auto kForward>
double input_gradient_cost(const Conv2dProblem& a, const Machine& machine) {
  double seconds = 0;
  for_each_phase(a, [&](const Conv2dProblem& b, int64_t, int64_t) { seconds += b.R * b.S == 0 ? 0 : kForward(b, machine); });
  return seconds;
}

template <auto kForward>
const char* input_gradient_reject(const Conv2dProblem& a) {
  const char* reason = nullptr;
  for_each_phase(a, [&](const Conv2dProblem& b, int64_t, int64_t) {
    if (!reason && b.R * b.S != 0) reason = kForward(b);
  });
  return reason;
}

}  // namespace fastconv::FASTCONV_TARGET

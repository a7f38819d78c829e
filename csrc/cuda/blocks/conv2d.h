// What the convolution kernels share: sizes, refusals, and the input gradient by phases.
#pragma once

#include "cuda/blocks/epilogue.h"
#include "cuda/blocks/place.h"

#include "core/input_phases.h"

namespace fastconv::sm80 {

FC_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline double conv2d_flops(const Conv2dProblem& a) {
  return 2.0 * double(a.N) * double(a.K) * double(a.P) * double(a.Q) * double(a.C / a.groups) * double(a.R) * double(a.S);
}

inline const char* conv2d_reject(const Conv2dProblem& a) {
  if (image_too_large(a.C * a.H * a.W) || image_too_large(a.K * a.P * a.Q)) return "an image has more than 2^30 elements";
  return image_too_large(a.C / a.groups * a.R * a.S) ? "a filter has more than 2^30 elements" : nullptr;
}

inline int64_t no_workspace(const Conv2dProblem&, const Machine&) { return 0; }

// --- the functions of an input gradient, made from those of a forward kernel that also takes problems without taps

template <class T>
void input_gradient_run(const Kernel<Conv2dProblem>& forward, const Conv2dProblem& a, const Conv2dArgs& args,
                        const Context& context) {
  for_each_phase(a, [&](const Conv2dProblem& b, int64_t w_offset, int64_t x_offset) {
    // Without taps the filters are not read, and their offset says nothing.
    forward.run(b,
                {args.y, b.R * b.S == 0 ? args.w : static_cast<T*>(args.w) + w_offset, nullptr, nullptr,
                 static_cast<T*>(args.x) + x_offset},
                context);
  });
}

inline const char* input_gradient_reject(const Kernel<Conv2dProblem>& forward, const Conv2dProblem& a) {
  const char* reason = nullptr;
  for_each_phase(a, [&](const Conv2dProblem& b, int64_t, int64_t) {
    if (!reason) reason = forward.reject(b);
  });
  return reason;
}

inline double input_gradient_cost(const Kernel<Conv2dProblem>& forward, const Conv2dProblem& a, const Machine& machine) {
  double seconds = 0;
  for_each_phase(a, [&](const Conv2dProblem& b, int64_t, int64_t) { seconds += forward.cost(b, machine); });
  return seconds;
}

inline int64_t input_gradient_workspace(const Kernel<Conv2dProblem>& forward, const Conv2dProblem& a, const Machine& machine) {
  int64_t most = 0;
  for_each_phase(a, [&](const Conv2dProblem& b, int64_t, int64_t) {
    const int64_t bytes = forward.workspace(b, machine);
    most = bytes > most ? bytes : most;
  });
  return most;
}

// The input gradient on the forward kernel `kForward`, whose operands are of type T and whose errors grow by kGrowth.
template <class T, const Kernel<Conv2dProblem>& kForward, int kGrowth = 1>
struct InputGradient {
  static const char* reject(const Conv2dProblem& a) { return input_gradient_reject(kForward, a); }
  static double cost(const Conv2dProblem& a, const Machine& machine) { return input_gradient_cost(kForward, a, machine); }
  static int64_t workspace(const Conv2dProblem& a, const Machine& machine) {
    return input_gradient_workspace(kForward, a, machine);
  }
  static void run(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context) {
    input_gradient_run<T>(kForward, a, args, context);
  }
  static constexpr Kernel<Conv2dProblem> kKernel = {float(kGrowth), reject, cost, workspace, run};
};

}  // namespace fastconv::sm80

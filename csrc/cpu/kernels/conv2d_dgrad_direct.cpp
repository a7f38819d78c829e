// conv2d_dgrad.direct: the input gradient in place, whatever the strides: forward convolutions by phases
// (blocks/input_gradient.h) on conv2d_fwd.direct. Takes every problem and needs no workspace.
#include "cpu/blocks/input_gradient.h"

namespace fastconv::FASTCONV_TARGET {

extern const Kernel<Conv2dProblem> conv2d_fwd_direct_f32, conv2d_fwd_direct_f64;

namespace {

template <class T>
const Kernel<Conv2dProblem>& forward() {
  if constexpr (sizeof(T) == 4) {
    return conv2d_fwd_direct_f32;
  } else {
    return conv2d_fwd_direct_f64;
  }
}

// --- run: one phase, in forward terms
template <class T>
void run_phase(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context) {
  forward<T>().run(a, args, context);
}

// --- contract
const char* reject(const Conv2dProblem&) { return nullptr; }

template <class T>
double phase_cost(const Conv2dProblem& a, const Machine& machine) {
  return forward<T>().cost(a, machine);
}

template <class T>
int64_t phase_workspace(const Conv2dProblem& a, const Machine& machine) {
  return forward<T>().workspace(a, machine);
}

template <class T>
constexpr Kernel<Conv2dProblem> kKernel = {1.0f, reject, input_gradient_cost<phase_cost<T>>,
                                           input_gradient_workspace<phase_workspace<T>>, input_gradient_run<T, run_phase<T>>};

}  // namespace

extern constinit const Kernel<Conv2dProblem> conv2d_dgrad_direct_f32 = kKernel<float>;
extern constinit const Kernel<Conv2dProblem> conv2d_dgrad_direct_f64 = kKernel<double>;

}  // namespace fastconv::FASTCONV_TARGET

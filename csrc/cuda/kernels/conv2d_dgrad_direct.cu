// conv2d_dgrad.direct: the input gradient by phases (core/input_phases.h), each a convolution of y with flipped
// filters, on conv2d_fwd.direct.
#include "cuda/blocks/conv2d.h"

namespace fastconv::sm80 {

extern const Kernel<Conv2dProblem> conv2d_fwd_direct_f32, conv2d_fwd_direct_f16, conv2d_fwd_direct_bf16;

// --- contract
extern constinit const Kernel<Conv2dProblem> conv2d_dgrad_direct_f32 = InputGradient<float, conv2d_fwd_direct_f32>::kKernel;
extern constinit const Kernel<Conv2dProblem> conv2d_dgrad_direct_f16 = InputGradient<__half, conv2d_fwd_direct_f16>::kKernel;
extern constinit const Kernel<Conv2dProblem> conv2d_dgrad_direct_bf16 =
    InputGradient<__nv_bfloat16, conv2d_fwd_direct_bf16>::kKernel;

}  // namespace fastconv::sm80

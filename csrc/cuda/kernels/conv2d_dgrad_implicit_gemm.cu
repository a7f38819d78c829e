// conv2d_dgrad.implicit_gemm: the input gradient by phases (core/input_phases.h), each a convolution of y with flipped filters,
// on conv2d_fwd.implicit_gemm. The filters' reduction then runs along k, which no layout has as neighbours, so they are gathered.
#include "cuda/blocks/conv2d.h"
#include "cuda/blocks/mma.h"

namespace fastconv::sm80 {

extern const Kernel<Conv2dProblem> conv2d_fwd_implicit_gemm_f32, conv2d_fwd_implicit_gemm_f16, conv2d_fwd_implicit_gemm_bf16;

// --- contract
extern constinit const Kernel<Conv2dProblem> conv2d_dgrad_implicit_gemm_f32 =
    InputGradient<float, conv2d_fwd_implicit_gemm_f32, int(kTf32Growth)>::kKernel;
extern constinit const Kernel<Conv2dProblem> conv2d_dgrad_implicit_gemm_f16 =
    InputGradient<__half, conv2d_fwd_implicit_gemm_f16>::kKernel;
extern constinit const Kernel<Conv2dProblem> conv2d_dgrad_implicit_gemm_bf16 =
    InputGradient<__nv_bfloat16, conv2d_fwd_implicit_gemm_bf16>::kKernel;

}  // namespace fastconv::sm80

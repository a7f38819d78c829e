// conv2d_fwd.depthwise: one input channel for each group. There is no sum over channels, so no GEMM: the work is done by the
// loops of blocks/depthwise_channels.cpp (NHWC) and blocks/depthwise_rows.cpp (everything else), which hold the tile, transform,
// multiply and run sections and are shared with the input gradient.
#include "cpu/blocks/depthwise.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- contract
template <class T>
constexpr Kernel<Conv2dProblem> kKernel = {1.0f, depthwise_reject, depthwise_cost<T>, depthwise_workspace<T>, depthwise_run<T>};

}  // namespace

extern constinit const Kernel<Conv2dProblem> conv2d_fwd_depthwise_f32 = kKernel<float>;
extern constinit const Kernel<Conv2dProblem> conv2d_fwd_depthwise_f64 = kKernel<double>;

}  // namespace fastconv::FASTCONV_TARGET

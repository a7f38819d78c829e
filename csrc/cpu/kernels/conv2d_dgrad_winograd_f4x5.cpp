// conv2d_dgrad.winograd_f4x5: with stride 1 the input gradient is a forward convolution with flipped filters
// (blocks/input_gradient.h), in tiles of 4x4 (blocks/winograd.h).
#include "cpu/blocks/input_gradient.h"
#include "cpu/blocks/winograd.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- contract
constexpr float kErrorGrowth = 4.0f;
const char* reject(const Conv2dProblem& a) { return input_gradient_reject<winograd_reject<F<4, 5>>>(a); }

constexpr Kernel<Conv2dProblem> kKernel = {kErrorGrowth, reject, input_gradient_cost<winograd_cost<float, F<4, 5>>>,
                                           input_gradient_workspace<winograd_workspace<float, F<4, 5>>>,
                                           input_gradient_run<float, winograd_run<float, F<4, 5>>>};

}  // namespace

extern constinit const Kernel<Conv2dProblem> conv2d_dgrad_winograd_f4x5_f32 = kKernel;

}  // namespace fastconv::FASTCONV_TARGET

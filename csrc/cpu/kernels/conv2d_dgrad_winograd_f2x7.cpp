// conv2d_dgrad.winograd_f2x7: with stride 1 the input gradient is a forward convolution with flipped filters
// (blocks/input_gradient.h), in tiles of 2x2 (blocks/winograd.h).
#include "cpu/blocks/input_gradient.h"
#include "cpu/blocks/winograd.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- contract
constexpr float kErrorGrowth = 4.0f;
const char* reject(const Conv2dProblem& a) { return input_gradient_reject<winograd_reject<F<2, 7>>>(a); }

constexpr Kernel<Conv2dProblem> kKernel = {kErrorGrowth, reject, input_gradient_cost<winograd_cost<float, F<2, 7>>>,
                                           input_gradient_workspace<winograd_workspace<float, F<2, 7>>>,
                                           input_gradient_run<float, winograd_run<float, F<2, 7>>>};

}  // namespace

extern constinit const Kernel<Conv2dProblem> conv2d_dgrad_winograd_f2x7_f32 = kKernel;

}  // namespace fastconv::FASTCONV_TARGET

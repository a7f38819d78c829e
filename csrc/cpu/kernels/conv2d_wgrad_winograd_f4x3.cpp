// conv2d_wgrad.winograd_f4x3: the gradient of 3x3 filters of stride 1 from tiles of 4x4 output pixels (4.00 times fewer
// products than a sum over pixels).
//
//   tile       blocks/gemm_tile.h                  6 filters x 64 channels in registers (AVX-512), 4 x 24 (AVX2)
//   transform  blocks/winograd_windows.h           vectors of channels of x and of filters of y, a few tiles at a time
//   multiply   blocks/gemm_tile.cpp                36 multiplications over the tiles
//   run        blocks/winograd_filter_gradient.cpp blocks of filters and channels, then blocks of tiles
#include "cpu/blocks/winograd.h"
#include "cpu/blocks/winograd_filter_gradient.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- contract
constexpr float kErrorGrowth = 4.0f;
constexpr Kernel<Conv2dProblem> kKernel = {kErrorGrowth, winograd_reject<F<4, 3>>, winograd_filter_gradient_cost<float, F<4, 3>>,
                                           winograd_filter_gradient_workspace<float, F<4, 3>>,
                                           winograd_filter_gradient_run<float, F<4, 3>>};

}  // namespace

extern constinit const Kernel<Conv2dProblem> conv2d_wgrad_winograd_f4x3_f32 = kKernel;

}  // namespace fastconv::FASTCONV_TARGET

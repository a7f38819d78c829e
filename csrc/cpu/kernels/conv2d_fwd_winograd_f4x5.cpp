// conv2d_fwd.winograd_f4x5: 5x5 filters of stride 1 in tiles of 4x4 outputs (6.25 times fewer products than a sum over taps).
//
//   tile       blocks/gemm_tile.h           6 tiles x 64 filters in registers (AVX-512), 4 x 24 (AVX2)
//   transform  blocks/winograd_transform.h  vectors of channels; filters a panel at a time, for all tiles of a batch
//   multiply   blocks/gemm_tile.cpp         64 multiplications over the channels
//   run        blocks/winograd.cpp          batches of tiles, then panels of filters, then blocks of tiles
#include "cpu/blocks/winograd.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- contract
constexpr float kErrorGrowth = 4.0f;
constexpr Kernel<Conv2dProblem> kKernel = {kErrorGrowth,
                                           winograd_reject<F<4, 5>>,
                                           winograd_cost<float, F<4, 5>>,
                                           winograd_workspace<float, F<4, 5>>,
                                           winograd_run<float, F<4, 5>>,
                                           winograd_packed<float, F<4, 5>>,
                                           winograd_pack<float, F<4, 5>>};

}  // namespace

extern constinit const Kernel<Conv2dProblem> conv2d_fwd_winograd_f4x5_f32 = kKernel;

}  // namespace fastconv::FASTCONV_TARGET

// conv2d_fwd.winograd_f6x3: 3x3 filters of stride 1 in tiles of 6x6 outputs (5.06 times fewer products than a sum over taps).
//
//   tile       blocks/gemm_tile.h           6 tiles x 64 filters in registers (AVX-512), 4 x 24 (AVX2)
//   transform  blocks/winograd_transform.h  vectors of channels; filters a panel at a time, for all tiles of a batch
//   multiply   blocks/gemm_tile.cpp         64 multiplications over the channels
//   run        blocks/winograd.cpp          batches of tiles, then panels of filters, then blocks of tiles
#include "cpu/blocks/winograd.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- contract
constexpr float kErrorGrowth = 12.0f;
constexpr Kernel<Conv2dProblem> kKernel = {kErrorGrowth,
                                           winograd_reject<F<6, 3>>,
                                           winograd_cost<float, F<6, 3>>,
                                           winograd_workspace<float, F<6, 3>>,
                                           winograd_run<float, F<6, 3>>,
                                           winograd_packed<float, F<6, 3>>,
                                           winograd_pack<float, F<6, 3>>};

}  // namespace

extern constinit const Kernel<Conv2dProblem> conv2d_fwd_winograd_f6x3_f32 = kKernel;

}  // namespace fastconv::FASTCONV_TARGET

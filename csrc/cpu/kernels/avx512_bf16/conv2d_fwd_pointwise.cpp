// conv2d_fwd.pointwise with products of pairs: bf16 1x1 filters of channels-last images, and Linear.
//
//   tile       blocks/avx512_bf16/pair_tile.h   6 x 64 in registers
//   transform  blocks/avx512_bf16/pair_panel.cpp
//   multiply   blocks/avx512_bf16/pair_tile.cpp
//   run        blocks/avx512_bf16/pair_rows.cpp
#include "cpu/blocks/avx512_bf16/pair_rows.h"

namespace fastconv::FASTCONV_TARGET {

extern constinit const Kernel<Conv2dProblem> conv2d_fwd_pointwise_bf16 = {
    1.0f, pair_rows_reject, pair_rows_cost, pair_rows_workspace, pair_rows_run, pair_rows_packed, pair_rows_pack};

}  // namespace fastconv::FASTCONV_TARGET

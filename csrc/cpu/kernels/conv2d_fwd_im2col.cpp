// conv2d_fwd.im2col: a matrix multiplication of filters by columns of pixels, where the column matrix exists a block at a time.
// Takes every problem; made for NCHW, whose pixels lie side by side.
//
//   tile       blocks/gemm_tile.h    6 filters x 64 pixels in registers (AVX-512), 4 x 24 (AVX2)
//   transform  blocks/pixel_panel.h  pixels to panels [channel, tap][pixel], at most 512 KB of them, in L2
//   multiply   blocks/gemm_tile.cpp
//   run        blocks/filter_rows.cpp  blocks of pixels, then blocks of the reduction, then tiles of filters
#include "cpu/blocks/conv2d_geometry.h"
#include "cpu/blocks/filter_rows.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- contract
const char* reject(const Conv2dProblem&) { return nullptr; }

template <class T>
double cost(const Conv2dProblem& a, const Machine& machine) {
  return conv2d_flops(a) / (peak_flops<T>(machine) * filter_rows_efficiency<T>(a));
}

template <class T>
constexpr Kernel<Conv2dProblem> kKernel = {1.0f, reject, cost<T>, filter_rows_workspace<T>, filter_rows_run<T>};

}  // namespace

extern constinit const Kernel<Conv2dProblem> conv2d_fwd_im2col_f32 = kKernel<float>;
extern constinit const Kernel<Conv2dProblem> conv2d_fwd_im2col_f64 = kKernel<double>;

}  // namespace fastconv::FASTCONV_TARGET

// conv2d_fwd.implicit_gemm: the workhorse for filters larger than 1x1 in channels_last. The rows of the matrix multiplication are
// output pixels, addressed through pointers (Dukhan, "The Indirect Convolution Algorithm", 2019), so no column matrix exists.
// NCHW comes and goes through a stage, which with a stride is quicker than im2col's packing.
//
//   tile       blocks/gemm_tile.h     6 pixels x 64 filters in registers (AVX-512), 4 x 24 (AVX2)
//   transform  blocks/filter_panel.h  filters to panels [tap][channel][filter], a block of at most 1536 rows at a time, in L2
//   multiply   blocks/gemm_tile.cpp
//   run        blocks/pixel_rows.cpp  panels of filters, then blocks of the reduction, then tiles of pixels
//              blocks/pixel_images.h  NCHW, some samples at a time
#include "cpu/blocks/pixel_images.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- contract
const char* reject(const Conv2dProblem& a) {
  if (a.R * a.S == 1) return "the filters are 1x1, which is pointwise";
  return pixel_images_reject(a);
}

template <class T>
constexpr Kernel<Conv2dProblem> kKernel = {1.0f,
                                           reject,
                                           pixel_images_cost<T>,
                                           pixel_images_workspace<T>,
                                           pixel_images_run<T>,
                                           pixel_images_packed<T>,
                                           pixel_images_pack<T>};

}  // namespace

extern constinit const Kernel<Conv2dProblem> conv2d_fwd_implicit_gemm_f32 = kKernel<float>;
extern constinit const Kernel<Conv2dProblem> conv2d_fwd_implicit_gemm_f64 = kKernel<double>;

}  // namespace fastconv::FASTCONV_TARGET

// conv2d_fwd.pointwise: 1x1 filters, which is a plain matrix multiplication, and so is Linear. Rows are pixels, read where they
// lie; filters are packed. NCHW comes and goes through a stage, for wide layers: im2col, which reads NCHW's planes and filters
// where they lie, has the others. Halves are stored: channels-last images only, computed in f32.
//
//   tile       blocks/gemm_tile.h     6 pixels x 64 filters in registers (AVX-512), 4 x 24 (AVX2)
//   transform  blocks/filter_panel.h
//   multiply   blocks/gemm_tile.cpp
//   run        blocks/pixel_rows.cpp, blocks/half_rows.cpp, blocks/pixel_images.h for NCHW
#include "cpu/blocks/half_rows.h"
#include "cpu/blocks/pixel_images.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- contract
const char* reject(const Conv2dProblem& a) {
  if (a.R * a.S != 1) return "the filters are larger than 1x1";
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

template <class S>
constexpr Kernel<Conv2dProblem> kHalves = {1.0f,
                                           half_rows_reject,
                                           pixel_rows_cost<float>,
                                           half_rows_workspace<S>,
                                           half_rows_run<S>,
                                           pixel_rows_packed<S>,
                                           pixel_rows_pack<S>};

}  // namespace

extern constinit const Kernel<Conv2dProblem> conv2d_fwd_pointwise_f32 = kKernel<float>;
extern constinit const Kernel<Conv2dProblem> conv2d_fwd_pointwise_f64 = kKernel<double>;
extern constinit const Kernel<Conv2dProblem> conv2d_fwd_pointwise_bf16 = kHalves<bf16>;
extern constinit const Kernel<Conv2dProblem> conv2d_fwd_pointwise_f16 = kHalves<f16>;

}  // namespace fastconv::FASTCONV_TARGET

// conv2d_fwd.implicit_gemm: the workhorse for filters larger than 1x1 in channels_last. The rows of the matrix multiplication are
// output pixels, addressed through pointers (Dukhan, "The Indirect Convolution Algorithm", 2019), so no column matrix exists.
// NCHW comes and goes through a stage, which with a stride is quicker than im2col's packing.
//
//   tile       blocks/gemm_tile.h     6 pixels x 64 filters in registers (AVX-512), 4 x 24 (AVX2)
//   transform  blocks/filter_panel.h  filters to panels [tap][channel][filter], a block of at most 1536 rows at a time, in L2
//   multiply   blocks/gemm_tile.cpp
//   run        blocks/pixel_rows.cpp  panels of filters, then blocks of the reduction, then tiles of pixels
//              blocks/image_stage.h   NCHW, some samples at a time
#include "cpu/blocks/conv2d_geometry.h"
#include "cpu/blocks/image_stage.h"
#include "cpu/blocks/pixel_rows.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

bool channels_last(const Conv2dProblem& a) { return !pixel_rows_reject(a); }

// --- run
template <class T>
void run(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context) {
  if (channels_last(a)) return pixel_rows_run<T>(a, args, context);
  image_stage_run<T, false, pixel_rows_run<T>, pixel_rows_workspace<T>>(a, args, context);
}

// --- contract
const char* reject(const Conv2dProblem& a) {
  if (a.R * a.S == 1) return "the filters are 1x1, which is pointwise";
  if (!channels_last(a) && !over_planes(a)) return "neither the channels nor the columns are contiguous in both x and y";
  return nullptr;
}

template <class T>
double pixels_cost(const Conv2dProblem& a, const Machine& machine) {
  return conv2d_flops(a) / (peak_flops<T>(machine) * pixel_rows_efficiency<T>(a));
}

template <class T>
double cost(const Conv2dProblem& a, const Machine& machine) {
  return channels_last(a) ? pixels_cost<T>(a, machine) : image_stage_cost<T, false, pixels_cost<T>>(a, machine);
}

template <class T>
int64_t workspace(const Conv2dProblem& a, const Machine& machine) {
  return channels_last(a) ? pixel_rows_workspace<T>(a, machine)
                          : image_stage_workspace<T, false, pixel_rows_workspace<T>>(a, machine);
}

template <class T>
PackedFilters packed(const Conv2dProblem& a) {
  return pixel_rows_packed<T>(channels_last(a) ? a : image_problem<T>(a));
}

template <class T>
void pack(const Conv2dProblem& a, const void* w, void* to) {
  pixel_rows_pack<T>(channels_last(a) ? a : image_problem<T>(a), w, to);
}

template <class T>
constexpr Kernel<Conv2dProblem> kKernel = {1.0f, reject, cost<T>, workspace<T>, run<T>, packed<T>, pack<T>};

}  // namespace

extern constinit const Kernel<Conv2dProblem> conv2d_fwd_implicit_gemm_f32 = kKernel<float>;
extern constinit const Kernel<Conv2dProblem> conv2d_fwd_implicit_gemm_f64 = kKernel<double>;

}  // namespace fastconv::FASTCONV_TARGET

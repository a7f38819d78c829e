// conv2d_fwd.pointwise: 1x1 filters, which is a plain matrix multiplication, and so is Linear. Rows are pixels, read where they
// lie; filters are packed. NCHW comes and goes through a stage, for wide layers: im2col, which reads NCHW's planes and filters
// where they lie, has the others. Halves are stored: channels-last images only, computed in f32.
//
//   tile       blocks/gemm_tile.h     6 pixels x 64 filters in registers (AVX-512), 4 x 24 (AVX2)
//   transform  blocks/filter_panel.h
//   multiply   blocks/gemm_tile.cpp
//   run        blocks/pixel_rows.cpp, blocks/half_rows.cpp, blocks/image_stage.h for NCHW
#include "cpu/blocks/conv2d_geometry.h"
#include "cpu/blocks/half_rows.h"
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
  if (a.R * a.S != 1) return "the filters are larger than 1x1";
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

template <class S>
constexpr Kernel<Conv2dProblem> kHalves = {
    1.0f, half_rows_reject, cost<float>, half_rows_workspace<S>, half_rows_run<S>, pixel_rows_packed<S>, pixel_rows_pack<S>};

}  // namespace

extern constinit const Kernel<Conv2dProblem> conv2d_fwd_pointwise_f32 = kKernel<float>;
extern constinit const Kernel<Conv2dProblem> conv2d_fwd_pointwise_f64 = kKernel<double>;
extern constinit const Kernel<Conv2dProblem> conv2d_fwd_pointwise_bf16 = kHalves<bf16>;
extern constinit const Kernel<Conv2dProblem> conv2d_fwd_pointwise_f16 = kHalves<f16>;

}  // namespace fastconv::FASTCONV_TARGET

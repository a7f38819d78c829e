// conv2d_fwd.pointwise: 1x1 filters, which is a plain matrix multiplication, and so is Linear. Channels-last images put pixels in
// the rows and pack filters, NCHW images put filters in the rows and pack pixels: what is contiguous is the vector, and the other
// operand is read where it lies. Halves are stored: channels-last images only, computed in f32.
//
//   tile       blocks/gemm_tile.h     6 x 64 in registers (AVX-512), 4 x 24 (AVX2)
//   transform  blocks/filter_panel.h, blocks/pixel_panel.h
//   multiply   blocks/gemm_tile.cpp
//   run        blocks/pixel_rows.cpp, blocks/filter_rows.cpp, blocks/half_rows.cpp
#include "cpu/blocks/conv2d_geometry.h"
#include "cpu/blocks/filter_rows.h"
#include "cpu/blocks/half_rows.h"
#include "cpu/blocks/pixel_rows.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

bool channels_last(const Conv2dProblem& a) { return !pixel_rows_reject(a); }
bool planes(const Conv2dProblem& a) { return a.x.w == 1 && a.y.w == 1; }

// --- run
template <class T>
void run(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context) {
  channels_last(a) ? pixel_rows_run<T>(a, args, context) : filter_rows_run<T>(a, args, context);
}

// --- contract
const char* reject(const Conv2dProblem& a) {
  if (a.R * a.S != 1) return "the filters are larger than 1x1";
  if (!channels_last(a) && !planes(a)) return "neither the channels nor the columns are contiguous in both x and y";
  return nullptr;
}

template <class T>
double cost(const Conv2dProblem& a, const Machine& machine) {
  // A percent better than im2col, which takes the same NCHW problems through the same code.
  const double efficiency = channels_last(a) ? pixel_rows_efficiency<T>(a) : 1.01 * filter_rows_efficiency<T>(a);
  return conv2d_flops(a) / (peak_flops<T>(machine) * efficiency);
}

template <class T>
int64_t workspace(const Conv2dProblem& a, const Machine& machine) {
  return channels_last(a) ? pixel_rows_workspace<T>(a, machine) : filter_rows_workspace<T>(a, machine);
}

// Filters that are rows are read where they lie.
template <class T>
PackedFilters packed(const Conv2dProblem& a) {
  return channels_last(a) ? pixel_rows_packed<T>(a) : PackedFilters{};
}

template <class T>
constexpr Kernel<Conv2dProblem> kKernel = {1.0f, reject, cost<T>, workspace<T>, run<T>, packed<T>, pixel_rows_pack<T>};

template <class S>
constexpr Kernel<Conv2dProblem> kHalves = {
    1.0f, half_rows_reject, cost<float>, half_rows_workspace<S>, half_rows_run<S>, pixel_rows_packed<S>, pixel_rows_pack<S>};

}  // namespace

extern constinit const Kernel<Conv2dProblem> conv2d_fwd_pointwise_f32 = kKernel<float>;
extern constinit const Kernel<Conv2dProblem> conv2d_fwd_pointwise_f64 = kKernel<double>;
extern constinit const Kernel<Conv2dProblem> conv2d_fwd_pointwise_bf16 = kHalves<bf16>;
extern constinit const Kernel<Conv2dProblem> conv2d_fwd_pointwise_f16 = kHalves<f16>;

}  // namespace fastconv::FASTCONV_TARGET

// pixel_rows on images of both formats, channels_last as they lie and NCHW through a stage: what implicit_gemm and pointwise are
// made of, forward and as an input gradient by phases.
#pragma once

#include "cpu/blocks/image_stage.h"
#include "cpu/blocks/input_gradient.h"
#include "cpu/blocks/pixel_rows.h"

namespace fastconv::FASTCONV_TARGET {

FC_INLINE bool over_pixels(const Conv2dProblem& a) { return a.x.c == 1 && a.y.c == 1; }

inline const char* pixel_images_reject(const Conv2dProblem& a) {
  if (!over_pixels(a) && !over_planes(a)) return "neither the channels nor the columns are contiguous in both x and y";
  return nullptr;
}

template <class T>
double pixel_rows_cost(const Conv2dProblem& a, const Machine& machine) {
  return conv2d_flops(a) / (peak_flops<T>(machine) * pixel_rows_efficiency<T>(a));
}

// --- forward

template <class T>
void pixel_images_run(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context) {
  if (over_pixels(a)) return pixel_rows_run<T>(a, args, context);
  image_stage_run<T, false, pixel_rows_run<T>, pixel_rows_workspace<T>>(a, args, context);
}

template <class T>
int64_t pixel_images_workspace(const Conv2dProblem& a, const Machine& machine) {
  return over_pixels(a) ? pixel_rows_workspace<T>(a, machine)
                        : image_stage_workspace<T, false, pixel_rows_workspace<T>>(a, machine);
}

template <class T>
double pixel_images_cost(const Conv2dProblem& a, const Machine& machine) {
  return over_pixels(a) ? pixel_rows_cost<T>(a, machine) : image_stage_cost<T, false, pixel_rows_cost<T>>(a, machine);
}

template <class T>
PackedFilters pixel_images_packed(const Conv2dProblem& a) {
  return pixel_rows_packed<T>(over_pixels(a) ? a : image_problem<T>(a));
}

template <class T>
void pixel_images_pack(const Conv2dProblem& a, const void* w, void* packed) {
  pixel_rows_pack<T>(over_pixels(a) ? a : image_problem<T>(a), w, packed);
}

// --- input gradient

template <class T>
void pixel_gradient_run(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context) {
  constexpr auto kRun = input_gradient_run<T, pixel_rows_run<T>>;
  if (over_pixels(a)) return kRun(a, args, context);
  image_stage_run<T, true, kRun, input_gradient_workspace<pixel_rows_workspace<T>>>(a, args, context);
}

template <class T>
int64_t pixel_gradient_workspace(const Conv2dProblem& a, const Machine& machine) {
  constexpr auto kWorkspace = input_gradient_workspace<pixel_rows_workspace<T>>;
  return over_pixels(a) ? kWorkspace(a, machine) : image_stage_workspace<T, true, kWorkspace>(a, machine);
}

template <class T>
double pixel_gradient_cost(const Conv2dProblem& a, const Machine& machine) {
  constexpr auto kCost = input_gradient_cost<pixel_rows_cost<T>>;
  return over_pixels(a) ? kCost(a, machine) : image_stage_cost<T, true, kCost>(a, machine);
}

}  // namespace fastconv::FASTCONV_TARGET

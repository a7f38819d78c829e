// A filter gradient that was summed in parts: fp32, (part, k, column), where the columns are a filter's elements in the order r,
// s, c and, where the problem asks for it, the bias. The parts are added in order, by one thread for each sum.
#pragma once

#include "cuda/blocks/conv2d.h"

namespace fastconv::sm80 {

inline int64_t filter_columns(const Conv2dProblem& a) { return a.R * a.S * (a.C / a.groups) + (a.epilogue.bias ? 1 : 0); }

inline const char* parts_reject(const Conv2dProblem& a) {
  if (image_too_large(a.N * a.P * a.Q)) return "more than 2^30 pixels are summed";
  return image_too_large(a.K * filter_columns(a)) ? "the filters have more than 2^30 elements" : conv2d_reject(a);
}

inline int64_t parts_bytes(const Conv2dProblem& a, int64_t parts) {
  return parts * a.K * filter_columns(a) * int64_t(sizeof(float));
}

// Pixels of a part, a multiple of `slice`: 256 and more, and so many parts that `tiles` blocks for each of them make about 512
// blocks, four for each multiprocessor of an A100.
inline int64_t part_length(const Conv2dProblem& a, int64_t tiles, int slice) {
  const int64_t pixels = a.N * a.P * a.Q, wanted = ceil_div(512, tiles), most = ceil_div(pixels, 256);
  return ceil_div(ceil_div(pixels, wanted < most ? wanted : most), slice) * slice;
}

inline constexpr int kPartsThreads = 256;

struct PartsDivisors {
  Divisor columns, c, s, filters;
};

template <class T>
__global__ void add_parts_kernel(Conv2dProblem a, PartsDivisors by, uint32_t sums, int64_t parts, const float* from, T* w,
                                 T* bias) {
  const uint32_t number = thread_number();
  if (number >= sums) return;
  float sum = 0;
  for (int64_t part = 0; part < parts; ++part) sum += from[part * sums + number];
  uint32_t k = number;
  uint32_t r = by.columns.take(k);
  if (bias && r == by.columns.d - 1) {
    bias[k] = from_float<T>(sum);
    return;
  }
  const int64_t c = by.c.take(r), s = by.s.take(r);
  const int64_t k_in_group = by.filters.take(k);
  w[k * a.w.g + k_in_group * a.w.k + c * a.w.c + r * a.w.r + s * a.w.s] = from_float<T>(sum);
}

// Writes args.w and args.bias from the parts in the workspace.
template <class T>
void add_parts(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context, int64_t parts) {
  const int64_t columns = filter_columns(a), sums = a.K * columns;
  const PartsDivisors by = {Divisor::by(columns), Divisor::by(a.C / a.groups), Divisor::by(a.S), Divisor::by(a.K / a.groups)};
  launch(context, add_parts_kernel<T>, ceil_div(sums, kPartsThreads), kPartsThreads, 0, a, by, uint32_t(sums), parts,
         static_cast<const float*>(context.workspace), static_cast<T*>(args.w),
         a.epilogue.bias ? static_cast<T*>(args.bias) : nullptr);
}

}  // namespace fastconv::sm80

// Where one pooling window lies: shared by the CPU's and the GPU's kernels.
//
// Included by objects of one instruction set, so it lives in their namespace: whoever includes it has defined FASTCONV_TARGET and
// FC_INLINE.
#pragma once

#include "core/problem.h"

namespace fastconv::FASTCONV_TARGET {

// One axis of a Pool2dProblem.
struct PoolAxis {
  int64_t in, out, size, stride, pad_begin, pad_end, dilation;
  bool adaptive;
};

// The positions of one window along one axis that lie inside the input: begin, begin + step, ... < end. padded counts the window
// clipped to the padded input only: what count_include_pad divides by.
struct PoolWindow {
  int64_t begin, end, step, padded;
  FC_INLINE bool empty() const { return begin >= end; }
};

// The windows begin..end-1 that contain one position of the input (without dilation).
struct PoolCover {
  int64_t begin, end;
};

FC_INLINE PoolAxis pool_axis_h(const Pool2dProblem& p) {
  return {p.H, p.P, p.R, p.stride_h, p.pad_top, p.pad_bottom, p.dilation_h, p.adaptive};
}
FC_INLINE PoolAxis pool_axis_w(const Pool2dProblem& p) {
  return {p.W, p.Q, p.S, p.stride_w, p.pad_left, p.pad_right, p.dilation_w, p.adaptive};
}

FC_INLINE PoolWindow pool_window(const PoolAxis& a, int64_t o) {
  if (a.adaptive) {
    const int64_t begin = o * a.in / a.out, end = ((o + 1) * a.in + a.out - 1) / a.out;
    return {begin, end, 1, end - begin};
  }
  const int64_t start = o * a.stride - a.pad_begin;
  const int64_t past = start + a.size, last = start + (a.size - 1) * a.dilation;
  const int64_t padded_end = a.in + a.pad_end;
  const int64_t begin = start >= 0 ? start : start + (a.dilation - 1 - start) / a.dilation * a.dilation;
  return {begin, last < a.in ? last + 1 : a.in, a.dilation, (past < padded_end ? past : padded_end) - start};
}

FC_INLINE PoolCover pool_cover(const PoolAxis& a, int64_t i) {
  if (a.adaptive) return {i * a.out / a.in, ((i + 1) * a.out + a.in - 1) / a.in};
  const int64_t first = i + a.pad_begin - a.size + 1;  // the earliest start that still reaches i
  const int64_t begin = first <= 0 ? 0 : (first + a.stride - 1) / a.stride;
  const int64_t end = i + a.pad_begin < 0 ? 0 : (i + a.pad_begin) / a.stride + 1;
  return {begin, end < a.out ? end : a.out};
}

// What the window counts along one axis; the divisor is the product of both axes unless divisor_override says otherwise.
FC_INLINE int64_t pool_count(const Pool2dProblem& p, const PoolWindow& w) {
  return p.count_include_pad ? w.padded : w.end - w.begin;
}

FC_INLINE int64_t pool_divisor(const Pool2dProblem& p, const PoolWindow& rows, const PoolWindow& cols) {
  return p.divisor_override != 0 ? p.divisor_override : pool_count(p, rows) * pool_count(p, cols);
}

}  // namespace fastconv::FASTCONV_TARGET

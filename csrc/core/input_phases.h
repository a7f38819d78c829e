// The input gradient as forward convolutions: no kernel of its own.
//
// With stride 1 it is a convolution of y with the filters flipped and k and c swapped, which strides alone express. With stride u
// x v it falls apart into u*v phases: the rows h of one residue modulo u meet only the filter rows r with (h + pad - r*dilation)
// divisible by u, which form an arithmetic progression. So each phase is a dense stride-1 convolution over a subset of the taps,
// written to every u-th row and v-th column of x. Nothing is multiplied with inserted zeros, and nothing is scattered.
//
// Included by objects of one instruction set, so it lives in their namespace: whoever includes it has defined
// FASTCONV_TARGET.
#pragma once

#include "core/problem.h"

namespace fastconv::FASTCONV_TARGET {

// One residue of one axis.
struct Phase {
  int64_t size;               // positions of this residue
  int64_t taps, first, step;  // filter positions first, first + step, ...
  int64_t dilation, pad;      // of the stride-1 convolution, whose taps run backwards
};

inline int64_t greatest_common_divisor(int64_t a, int64_t b) {
  while (b != 0) {
    const int64_t rest = a % b;
    a = b;
    b = rest;
  }
  return a;
}

inline Phase phase_of(int64_t residue, int64_t size, int64_t taps, int64_t stride, int64_t dilation, int64_t pad) {
  const int64_t divisor = greatest_common_divisor(dilation, stride);
  Phase phase = {residue < size ? (size - residue + stride - 1) / stride : 0, 0, 0, stride / divisor, dilation / divisor, 0};
  // Of stride/divisor neighbouring taps at most one meets this residue.
  for (int64_t r = 0; r < phase.step && r < taps; ++r) {
    const int64_t reach = residue + pad - r * dilation;
    if (reach % stride != 0) continue;
    phase.first = r;
    phase.taps = (taps - r + phase.step - 1) / phase.step;
    // Position i of the residue meets output i + reach/stride - t*dilation' under tap first + t*step.
    phase.pad = (phase.taps - 1) * phase.dilation - reach / stride;
    break;
  }
  return phase;
}

// The forward problem of one pair of phases: its "x" is y, its "y" is x, and its taps run backwards through w.
inline Conv2dProblem phase_problem(const Conv2dProblem& a, const Phase& h, const Phase& w) {
  Conv2dProblem b = a;
  b.C = a.K, b.H = a.P, b.W = a.Q;
  b.K = a.C, b.P = h.size, b.Q = w.size;
  b.R = h.taps, b.S = w.taps;
  b.stride_h = b.stride_w = 1;
  b.dilation_h = h.dilation, b.dilation_w = w.dilation;
  b.pad_top = h.pad, b.pad_left = w.pad;
  b.x = a.y;
  b.y = {a.x.n, a.x.c, a.x.h * a.stride_h, a.x.w * a.stride_w};
  b.w = {a.w.g, a.w.c, a.w.k, -h.step * a.w.r, -w.step * a.w.s};
  return b;
}

// visit(forward problem, offset into w, offset into x) for every phase that has positions. A phase may have no taps: then R or S
// is 0 and all that is left of it is the epilogue.
template <class Visit>
inline void for_each_phase(const Conv2dProblem& a, const Visit& visit) {
  for (int64_t h = 0; h < a.stride_h; ++h) {
    const Phase rows = phase_of(h, a.H, a.R, a.stride_h, a.dilation_h, a.pad_top);
    for (int64_t w = 0; w < a.stride_w; ++w) {
      const Phase columns = phase_of(w, a.W, a.S, a.stride_w, a.dilation_w, a.pad_left);
      if (rows.size == 0 || columns.size == 0) continue;
      const int64_t last_r = rows.first + (rows.taps - 1) * rows.step, last_s = columns.first + (columns.taps - 1) * columns.step;
      visit(phase_problem(a, rows, columns), last_r * a.w.r + last_s * a.w.s, h * a.x.h + w * a.x.w);
    }
  }
}

}  // namespace fastconv::FASTCONV_TARGET

// What the pooling kernels share: where windows lie, who computes what, and the contract.
#pragma once

#include "cuda/blocks/element.h"
#include "cuda/blocks/place.h"

#include "core/pool_axis.h"

namespace fastconv::sm80 {

// Eight warps: enough to fill a multiprocessor with few blocks, and small enough that the last block wastes little.
inline constexpr int kPoolThreads = 256;

inline int64_t pool_blocks(uint32_t count) { return (int64_t(count) + kPoolThreads - 1) / kPoolThreads; }

// Whether a thread may own kWide<T> channels: they are neighbours in x and y, and every pack is aligned.
template <class T>
bool pool_is_wide(const Pool2dProblem& a, const Pool2dArgs& args) {
  return a.x.c == 1 && a.y.c == 1 && a.C % kWide<T> == 0 && packs_fit<T>(args.x, {{a.N, a.x.n}, {a.H, a.x.h}, {a.W, a.x.w}}) &&
         packs_fit<T>(args.y, {{a.N, a.y.n}, {a.P, a.y.h}, {a.Q, a.y.w}});
}

inline const char* pool_reject(const Pool2dProblem& a) {
  return image_too_large(a.C * a.H * a.W) || image_too_large(a.C * a.P * a.Q) ? "an image has more than 2^30 elements" : nullptr;
}

inline const char* avg_pool_reject(const Pool2dProblem& a) {
  return a.dilation_h == 1 && a.dilation_w == 1 ? pool_reject(a) : "average pooling has no dilation";
}

// The time to read x and write y once at 2 TB/s, an A100's bandwidth: only compared, and there is one kernel to each op so far.
template <class T>
double pool_cost(const Pool2dProblem& a, const Machine&) {
  return double(a.N * a.C * (a.H * a.W + a.P * a.Q)) * sizeof(T) / 2e12;
}

inline int64_t pool_workspace(const Pool2dProblem&, const Machine&) { return 0; }

}  // namespace fastconv::sm80

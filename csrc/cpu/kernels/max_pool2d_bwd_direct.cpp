// max_pool2d_bwd.direct: one plane at a time, every gradient added where its index points. Any strides.
//
// The sum of each x is in the order of (p, q), whatever the number of threads. An index outside the plane adds nothing: indices
// are data, and data must not become an address unchecked.
#include "cpu/blocks/parallel.h"
#include "cpu/blocks/pool_window.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- tile: one plane. It is cleared just before it is added to, so that a plane up to the L2 goes to memory once.

// --- transform: the plane of x starts as zeros.
template <class T>
FC_INLINE void clear(const Pool2dProblem& a, T* plane) {
  for (int64_t h = 0; h < a.H; ++h) {
    T* x_row = plane + h * a.x.h;
    if (a.x.w == 1) {
      for (int64_t w = 0; w < a.W; ++w) x_row[w] = 0;
    } else {
      for (int64_t w = 0; w < a.W; ++w) x_row[w * a.x.w] = 0;
    }
  }
}

// --- reduce: kDense where the index is the offset. Elsewhere it takes a division, which costs ten times the rest.
template <bool kDense, class T>
FC_INLINE void scatter(const Pool2dProblem& a, T* plane, const T* y, const int64_t* indices) {
  const uint64_t positions = uint64_t(a.H * a.W), W = uint64_t(a.W);
  for (int64_t p = 0; p < a.P; ++p) {
    for (int64_t q = 0; q < a.Q; ++q) {
      const uint64_t index = uint64_t(indices[p * a.y.h + q * a.y.w]);
      if (index >= positions) continue;
      const int64_t offset = kDense ? int64_t(index) : int64_t(index / W) * a.x.h + int64_t(index % W) * a.x.w;
      plane[offset] += y[p * a.y.h + q * a.y.w];
    }
  }
}

// --- run: one task is one plane.
template <class T>
void run(const Pool2dProblem& a, const Pool2dArgs& args, const Context& context) {
  parallel_ranges(context, a.N * a.C, [&](int, int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / a.C, c = task % a.C, offset = n * a.y.n + c * a.y.c;
      T* plane = static_cast<T*>(args.x) + n * a.x.n + c * a.x.c;
      clear(a, plane);
      if (a.x.w == 1 && a.x.h == a.W) {
        scatter<true>(a, plane, static_cast<const T*>(args.y) + offset, args.indices + offset);
      } else {
        scatter<false>(a, plane, static_cast<const T*>(args.y) + offset, args.indices + offset);
      }
    }
  });
}

// --- contract
const char* reject(const Pool2dProblem&) { return nullptr; }

// 3 cycles an output where neighbours share cache lines, a quarter for each cleared x. Strided planes use a line for one element.
double cost(const Pool2dProblem& a, const Machine& machine) {
  const bool dense = a.x.w == 1 && a.x.h == a.W;
  const double per_y = dense ? 3 : 45, per_x = a.x.w == 1 ? 0.25 : 4;
  return pool_seconds(double(a.N * a.C) * (per_y * double(a.P * a.Q) + per_x * double(a.H * a.W)), machine);
}

int64_t workspace(const Pool2dProblem&, const Machine&) { return 0; }

template <class T>
constexpr Kernel<Pool2dProblem> kKernel = {1.0f, reject, cost, workspace, run<T>};

}  // namespace

extern constinit const Kernel<Pool2dProblem> max_pool2d_bwd_direct_f32 = kKernel<float>;
extern constinit const Kernel<Pool2dProblem> max_pool2d_bwd_direct_f64 = kKernel<double>;

}  // namespace fastconv::FASTCONV_TARGET

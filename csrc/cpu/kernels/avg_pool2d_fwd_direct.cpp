// avg_pool2d_fwd.direct: one output at a time, any strides, any window. Takes what the fast kernels refuse.
#include "cpu/blocks/parallel.h"
#include "cpu/blocks/pool_window.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- tile: one output, summed in a scalar register.

// --- transform: none, x is read where it lies.

// --- reduce: each row of the window is summed on its own, so that rounding grows with R + S and not with R * S.
template <class T>
FC_INLINE T reduce(const Pool2dProblem& a, const T* plane, const PoolWindow& rows, const PoolWindow& cols) {
  T sum = 0;
  for (int64_t h = rows.begin; h < rows.end; ++h) {
    T row_sum = 0;
    for (int64_t w = cols.begin; w < cols.end; ++w) row_sum += plane[h * a.x.h + w * a.x.w];
    sum += row_sum;
  }
  return sum;
}

// --- run: one task is one output row.
template <class T>
void run(const Pool2dProblem& a, const Pool2dArgs& args, const Context& context) {
  const PoolWindows windows = pool_windows(a, context.workspace);
  parallel_ranges(context, a.N * a.C * a.P, [&](int, int64_t begin, int64_t end) {
    PoolPlace at(begin, a.C, a.P);
    for (int64_t task = begin; task < end; ++task, at.advance(a.C, a.P)) {
      const PoolWindow rows = windows.rows[at.row];
      const T* plane = static_cast<const T*>(args.x) + at.n * a.x.n + at.c * a.x.c;
      T* y = static_cast<T*>(args.y) + at.n * a.y.n + at.c * a.y.c + at.row * a.y.h;
      for (int64_t q = 0; q < a.Q; ++q) {
        const PoolWindow& cols = windows.cols[q];
        const bool empty = rows.empty() || cols.empty();
        y[q * a.y.w] = empty ? T(0) : reduce(a, plane, rows, cols) / T(pool_divisor(a, rows, cols));
      }
    }
  });
}

// --- contract
const char* reject(const Pool2dProblem& a) {
  return a.dilation_h == 1 && a.dilation_w == 1 ? nullptr : "average pooling has no dilation";
}

// One dependent add a tap, 4 cycles; 30 for the loop round a window and the division.
double cost(const Pool2dProblem& a, const Machine& machine) {
  return pool_seconds(double(a.N * a.C * a.P * a.Q) * (30 + 4 * pool_taps_h(a) * pool_taps_w(a)), machine);
}

int64_t workspace(const Pool2dProblem& a, const Machine&) { return PoolWindows::bytes(a); }

template <class T>
constexpr Kernel<Pool2dProblem> kKernel = {1.0f, reject, cost, workspace, run<T>};

}  // namespace

extern constinit const Kernel<Pool2dProblem> avg_pool2d_fwd_direct_f32 = kKernel<float>;
extern constinit const Kernel<Pool2dProblem> avg_pool2d_fwd_direct_f64 = kKernel<double>;

}  // namespace fastconv::FASTCONV_TARGET

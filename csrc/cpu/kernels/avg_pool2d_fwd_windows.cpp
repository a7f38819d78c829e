// avg_pool2d_fwd.windows: NCHW with few, wide windows. Vectors run along the row of the window.
#include "cpu/blocks/parallel.h"
#include "cpu/blocks/pool_rows.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- tile: one output, kSums vectors of partial sums: an addition takes 4 cycles and two start in each, but memory feeds fewer.
constexpr int kSums = 4;

// --- transform: none. Rows that follow each other in memory, as in a global average, are one long row.
struct Runs {
  int64_t count, length;
};
FC_INLINE Runs runs_of(const Pool2dProblem& a, const PoolWindow& rows, const PoolWindow& cols) {
  const int64_t height = rows.end - rows.begin, width = cols.end - cols.begin;
  return width == a.x.h ? Runs{1, height * width} : Runs{height, width};
}

// --- reduce: partial sums first, their tree last: the order depends on the window's shape alone.
template <class T>
FC_INLINE T reduce(const T* x, int64_t step, const Runs& runs) {
  constexpr int kL = kLanes<T>;
  vec<T> sum[kSums];
  for (auto& part : sum) part = zero<T>();
  for (int64_t r = 0; r < runs.count; ++r) {
    const T* run = x + r * step;
    int64_t i = 0;
    for (; i + kSums * kL <= runs.length; i += kSums * kL) {
#pragma GCC unroll 4
      for (int v = 0; v < kSums; ++v) sum[v] = sum[v] + load(run + i + v * kL);
    }
    for (; i + kL <= runs.length; i += kL) sum[0] = sum[0] + load(run + i);
    if (i < runs.length) sum[1] = sum[1] + load(run + i, int(runs.length - i));
  }
  return reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// --- run: one task is one output row.
template <class T>
void run(const Pool2dProblem& a, const Pool2dArgs& args, const Context& context) {
  const PoolWindows windows = pool_windows(a, context.workspace);
  parallel_ranges(context, a.N * a.C * a.P, [&](int, int64_t begin, int64_t end) {
    PoolPlace at(begin, a.C, a.P);
    for (int64_t task = begin; task < end; ++task, at.advance(a.C, a.P)) {
      const PoolWindow rows = windows.rows[at.row];
      const T* x_rows = static_cast<const T*>(args.x) + at.n * a.x.n + at.c * a.x.c + rows.begin * a.x.h;
      T* y = static_cast<T*>(args.y) + at.n * a.y.n + at.c * a.y.c + at.row * a.y.h;
      for (int64_t q = 0; q < a.Q; ++q) {
        const PoolWindow& cols = windows.cols[q];
        y[q * a.y.w] = reduce(x_rows + cols.begin, a.x.h, runs_of(a, rows, cols)) / T(pool_divisor(a, rows, cols));
      }
    }
  });
}

// --- contract
const char* reject(const Pool2dProblem& a) {
  if (a.x.w != 1) return "the rows of x are not dense";
  if (a.dilation_h != 1 || a.dilation_w != 1) return "average pooling has no dilation";
  if (pool_has_empty_window(a)) return "a window lies wholly in the padding";
  return nullptr;
}

// Per output, as measured (AVX-512): 50 cycles for the tree, the division and the loop, 7 for each run, 2 for each vector.
template <class T>
double cost(const Pool2dProblem& a, const Machine& machine) {
  const double height = pool_taps_h(a), width = pool_taps_w(a);
  const bool whole = a.Q == 1 && a.x.h == a.W;
  const double runs = whole ? 1 : height, length = whole ? height * width : width;
  return pool_seconds(double(a.N * a.C * a.P * a.Q) * (50 + runs * (7 + 2 * length / kLanes<T>)), machine);
}

int64_t workspace(const Pool2dProblem& a, const Machine&) { return PoolWindows::bytes(a); }

template <class T>
constexpr Kernel<Pool2dProblem> kKernel = {1.0f, reject, cost<T>, workspace, run<T>};

}  // namespace

extern constinit const Kernel<Pool2dProblem> avg_pool2d_fwd_windows_f32 = kKernel<float>;
extern constinit const Kernel<Pool2dProblem> avg_pool2d_fwd_windows_f64 = kKernel<double>;

}  // namespace fastconv::FASTCONV_TARGET

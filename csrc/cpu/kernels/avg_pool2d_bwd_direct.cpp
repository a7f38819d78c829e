// avg_pool2d_bwd.direct: one input position at a time, the sum of the windows that cover it. Any strides, any window.
#include "cpu/blocks/parallel.h"
#include "cpu/blocks/pool_window.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- tile: one x, summed in a scalar register. Gathered, not scattered, so that any share of the rows gives the same bits.

// --- transform: the counts of every window row and column, since a position meets them again and again.
struct Counts {
  int64_t *rows, *cols;  // (P), (Q); null where divisor_override rules
};
FC_INLINE Counts make_counts(const Pool2dProblem& a, int64_t* memory) {
  for (int64_t p = 0; p < a.P; ++p) memory[p] = pool_count(a, pool_window(pool_axis_h(a), p));
  for (int64_t q = 0; q < a.Q; ++q) memory[a.P + q] = pool_count(a, pool_window(pool_axis_w(a), q));
  return {memory, memory + a.P};
}

// --- reduce: in the order of p, then q.
template <class T>
FC_INLINE T reduce(const Pool2dProblem& a, const T* y, const Counts& counts, const PoolCover& ps, const PoolCover& qs) {
  T sum = 0;
  for (int64_t p = ps.begin; p < ps.end; ++p) {
    for (int64_t q = qs.begin; q < qs.end; ++q) {
      const int64_t divisor = a.divisor_override != 0 ? a.divisor_override : counts.rows[p] * counts.cols[q];
      sum += y[p * a.y.h + q * a.y.w] / T(divisor);
    }
  }
  return sum;
}

// --- run: one task is one row of x.
template <class T>
void run(const Pool2dProblem& a, const Pool2dArgs& args, const Context& context) {
  const Counts counts = make_counts(a, static_cast<int64_t*>(context.workspace));
  const PoolCovers covers = pool_covers(a, counts.cols + a.Q);
  parallel_ranges(context, a.N * a.C * a.H, [&](int, int64_t begin, int64_t end) {
    PoolPlace at(begin, a.C, a.H);
    for (int64_t task = begin; task < end; ++task, at.advance(a.C, a.H)) {
      const PoolCover ps = covers.rows[at.row];
      const T* y = static_cast<const T*>(args.y) + at.n * a.y.n + at.c * a.y.c;
      T* x = static_cast<T*>(args.x) + at.n * a.x.n + at.c * a.x.c + at.row * a.x.h;
      for (int64_t w = 0; w < a.W; ++w) x[w * a.x.w] = reduce(a, y, counts, ps, covers.cols[w]);
    }
  });
}

// --- contract
const char* reject(const Pool2dProblem& a) {
  return a.dilation_h == 1 && a.dilation_w == 1 ? nullptr : "average pooling has no dilation";
}

// 15 cycles for each x, and a division for each window that covers it.
double cost(const Pool2dProblem& a, const Machine& machine) {
  const double windows = pool_taps_h(a) * pool_taps_w(a) * double(a.P * a.Q) / double(a.H * a.W);
  return pool_seconds(double(a.N * a.C * a.H * a.W) * (15 + 10 * windows), machine);
}

int64_t workspace(const Pool2dProblem& a, const Machine&) {
  return (a.P + a.Q) * int64_t(sizeof(int64_t)) + PoolCovers::bytes(a);
}

template <class T>
constexpr Kernel<Pool2dProblem> kKernel = {1.0f, reject, cost, workspace, run<T>};

}  // namespace

extern constinit const Kernel<Pool2dProblem> avg_pool2d_bwd_direct_f32 = kKernel<float>;
extern constinit const Kernel<Pool2dProblem> avg_pool2d_bwd_direct_f64 = kKernel<double>;

}  // namespace fastconv::FASTCONV_TARGET

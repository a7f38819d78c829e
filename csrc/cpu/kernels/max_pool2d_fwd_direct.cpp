// max_pool2d_fwd.direct: one output at a time, any strides, any window. Takes what the fast kernels refuse.
#include "cpu/blocks/parallel.h"
#include "cpu/blocks/pool_window.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- tile: one output, its value and its index in scalar registers.
template <class T>
struct Best {
  T value;
  int64_t index;
};

// --- transform: none, x is read where it lies.

// --- reduce: the window rows x cols of one plane, in the order of rows, then columns. A window wholly in the padding is -inf at
// -1.
template <class T>
FC_INLINE Best<T> reduce(const Pool2dProblem& a, const T* plane, const PoolWindow& rows, const PoolWindow& cols) {
  Best<T> best{kPoolLowest<T>, rows.empty() || cols.empty() ? -1 : rows.begin * a.W + cols.begin};
  for (int64_t h = rows.begin; h < rows.end; h += rows.step) {
    for (int64_t w = cols.begin; w < cols.end; w += cols.step) {
      const T value = plane[h * a.x.h + w * a.x.w];
      if (value > best.value || value != value) best = {value, h * a.W + w};
    }
  }
  return best;
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
      const int64_t offset = at.n * a.y.n + at.c * a.y.c + at.row * a.y.h;
      for (int64_t q = 0; q < a.Q; ++q) {
        const Best<T> best = reduce(a, plane, rows, windows.cols[q]);
        static_cast<T*>(args.y)[offset + q * a.y.w] = best.value;
        if (args.indices) args.indices[offset + q * a.y.w] = best.index;
      }
    }
  });
}

// --- contract
const char* reject(const Pool2dProblem&) { return nullptr; }

// Compares and branches: about 4 cycles a tap, 20 for the loop round a window.
double cost(const Pool2dProblem& a, const Machine& machine) {
  return pool_seconds(double(a.N * a.C * a.P * a.Q) * (20 + 4 * pool_taps_h(a) * pool_taps_w(a)), machine);
}

int64_t workspace(const Pool2dProblem& a, const Machine&) { return PoolWindows::bytes(a); }

template <class T>
constexpr Kernel<Pool2dProblem> kKernel = {1.0f, reject, cost, workspace, run<T>};

}  // namespace

extern constinit const Kernel<Pool2dProblem> max_pool2d_fwd_direct_f32 = kKernel<float>;
extern constinit const Kernel<Pool2dProblem> max_pool2d_fwd_direct_f64 = kKernel<double>;

}  // namespace fastconv::FASTCONV_TARGET

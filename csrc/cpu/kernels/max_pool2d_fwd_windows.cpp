// max_pool2d_fwd.windows: NCHW with few, wide windows, the global maximum above all. Vectors run along the row of the window.
#include "cpu/blocks/parallel.h"
#include "cpu/blocks/pool_rows.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- tile: one output; in each lane the best of the columns that fell to it, and their index.
template <class T>
struct Best {
  vec<T> value;
  index_vec<T> index;
};

// --- transform: none.

// --- reduce: lanes first, then across them. In a lane the candidates come in the window's order, so the first of equals and the
// last NaN are right; across lanes that order is the order of the indices, which are kept even when nobody asks for them: +0 and
// -0 are equal, and the first of them is the answer.
template <class T>
FC_INLINE void take(Best<T>& best, vec<T> value, index_vec<T> at) {
  const mask<T> wins = pool_wins(value, best.value);
  best.value = blend(wins, value, best.value);
  best.index = blend(wins, at, best.index);
}

template <class T>
FC_INLINE void across(const Best<T>& best, int64_t none, T& value, int64_t& index) {
  value = kPoolLowest<T>;
  index = none;
  for (int i = 0; i < kLanes<T>; ++i) {
    const T lane = best.value.v[i];
    const int64_t at = best.index.v[i];
    const bool nan = lane != lane, best_nan = value != value;
    const bool wins = nan ? !best_nan || at > index : !best_nan && (lane > value || (lane == value && at < index));
    if (wins) value = lane, index = at;
  }
}

template <class T>
FC_INLINE void reduce(const Pool2dProblem& a, const T* plane, const PoolWindow& rows, const PoolWindow& cols, T& value,
                      int64_t& index) {
  using Int = typename int_of<T>::type;
  constexpr int kL = kLanes<T>;
  const vec<T> lowest = set1(kPoolLowest<T>);
  // Lanes that saw nothing larger than -inf answer with the window's first position, which no other index precedes.
  const int64_t none = rows.begin * a.W + cols.begin;
  Best<T> best{lowest, index_set1<T>(Int(none))};
  const index_vec<T> lane = index_iota<T>();
  for (int64_t h = rows.begin; h < rows.end; h += rows.step) {
    const T* x_row = plane + h * a.x.h;
    int64_t w = cols.begin;
    for (; w + kL <= cols.end; w += kL) take(best, load(x_row + w), lane + index_set1<T>(Int(h * a.W + w)));
    if (w < cols.end) {
      const int n = int(cols.end - w);
      take(best, blend(first_lanes<T>(n), load(x_row + w, n), lowest), lane + index_set1<T>(Int(h * a.W + w)));
    }
  }
  across(best, none, value, index);
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
        T value;
        int64_t index;
        reduce(a, plane, rows, windows.cols[q], value, index);
        static_cast<T*>(args.y)[offset + q * a.y.w] = value;
        if (args.indices) args.indices[offset + q * a.y.w] = index;
      }
    }
  });
}

// --- contract
const char* reject(const Pool2dProblem& a) {
  if (a.x.w != 1) return "the rows of x are not dense";
  if (a.dilation_w != 1) return "the columns of a window are not neighbours";
  if (a.H > INT32_MAX / a.W) return "the plane has 2^31 positions or more";
  if (pool_has_empty_window(a)) return "a window lies wholly in the padding";
  return nullptr;
}

// Per output, as measured (AVX-512): 9 cycles for each lane of the last comparison, 6.5 for each vector, 25 for the loop.
template <class T>
double cost(const Pool2dProblem& a, const Machine& machine) {
  const double vectors = pool_taps_h(a) * double(pool_ceil_div(int64_t(pool_taps_w(a)), kLanes<T>));
  return pool_seconds(double(a.N * a.C * a.P * a.Q) * (25 + 9 * kLanes<T> + 6.5 * vectors), machine);
}

int64_t workspace(const Pool2dProblem& a, const Machine&) { return PoolWindows::bytes(a); }

template <class T>
constexpr Kernel<Pool2dProblem> kKernel = {1.0f, reject, cost<T>, workspace, run<T>};

}  // namespace

extern constinit const Kernel<Pool2dProblem> max_pool2d_fwd_windows_f32 = kKernel<float>;
extern constinit const Kernel<Pool2dProblem> max_pool2d_fwd_windows_f64 = kKernel<double>;

}  // namespace fastconv::FASTCONV_TARGET

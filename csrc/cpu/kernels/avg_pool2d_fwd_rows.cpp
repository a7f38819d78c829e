// avg_pool2d_fwd.rows: NCHW. Vectors run along the row; the sum is taken down the column first, then along the row.
//
// Columns first: the vertical sum reads x with plain dense loads at any stride, and only its result, one row for each output row,
// has to be split for the horizontal one. R + S additions instead of R * S, and rounding that grows with R + S.
#include "cpu/blocks/parallel.h"
#include "cpu/blocks/pool_rows.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- tile: one row of column sums, split by the stride, in L1 (3x3 over 112 columns, stride 2: two phases
// of 80).
template <class T>
FC_INLINE int64_t scratch_bytes(const PhaseLayout& layout) {
  return pool_round_up(layout.size() * int64_t(sizeof(T)), 64);
}
// What all threads read: for each tap of a row its place in the phases, for each output the count of its window's columns.
template <class T>
FC_INLINE int64_t shared_bytes(const Pool2dProblem& a) {
  return pool_round_up(a.S * 8 + pool_round_up(a.Q, kLanes<T>) * int64_t(sizeof(T)), 64);
}

// --- transform: the window's rows are added up on their way into the phases, whose padding stays zero.
template <class T>
FC_INLINE void transform(const Pool2dProblem& a, const PhaseLayout& layout, T* phases, const T* plane, const PoolWindow& rows) {
  const T* top = plane + rows.begin * a.x.h;
  const int64_t step = a.x.h, more = rows.end - rows.begin - 1;
  split_row(layout, phases, [=](int64_t w, int n) {
    const T* x = top + w;
    vec<T> sum = load_up_to(x, n);
    for (int64_t r = 0; r < more; ++r) sum = sum + load_up_to(x += step, n);
    return sum;
  });
}

// --- reduce: along the row.
template <class T>
FC_INLINE void reduce(const Pool2dProblem& a, const T* phases, const int64_t* taps, const T* counts, T row_count, T* y) {
  for (int64_t q = 0; q < a.Q; q += kLanes<T>) {
    const int n = int(a.Q - q < kLanes<T> ? a.Q - q : kLanes<T>);
    vec<T> sum = load(phases + taps[0] + q);
    for (int64_t s = 1; s < a.S; ++s) sum = sum + load(phases + taps[s] + q);
    store_up_to(y + q, sum / (set1(row_count) * load(counts + q)), n);
  }
}

// --- run: one task is one output row.
template <class T>
void run(const Pool2dProblem& problem, const Pool2dArgs& args, const Context& context) {
  const Pool2dProblem a = pool_regular(problem);
  const PhaseLayout layout = phase_layout<T>(a);
  int64_t* const taps = static_cast<int64_t*>(context.workspace);
  T* const counts = reinterpret_cast<T*>(taps + a.S);
  for (int64_t s = 0; s < a.S; ++s) taps[s] = layout.tap(s);
  fill(counts, pool_round_up(a.Q, kLanes<T>), T(1));
  for (int64_t q = 0; q < a.Q; ++q) {
    counts[q] = a.divisor_override != 0 ? T(a.divisor_override) : T(pool_count(a, pool_window(pool_axis_w(a), q)));
  }
  char* const scratches = static_cast<char*>(context.workspace) + shared_bytes<T>(a);

  parallel_ranges(context, a.N * a.C * a.P, [&](int thread, int64_t begin, int64_t end) {
    T* const phases = reinterpret_cast<T*>(scratches + thread * scratch_bytes<T>(layout));
    fill(phases, layout.size(), T(0));
    PoolPlace at(begin, a.C, a.P);
    for (int64_t task = begin; task < end; ++task, at.advance(a.C, a.P)) {
      const PoolWindow rows = pool_window(pool_axis_h(a), at.row);
      transform(a, layout, phases, static_cast<const T*>(args.x) + at.n * a.x.n + at.c * a.x.c, rows);
      const T row_count = a.divisor_override != 0 ? T(1) : T(pool_count(a, rows));
      reduce(a, phases, taps, counts, row_count, static_cast<T*>(args.y) + at.n * a.y.n + at.c * a.y.c + at.row * a.y.h);
    }
  });
}

// --- contract
constexpr int64_t kMostScratch = 512 * 1024;  // half of the smallest L2 that has AVX-512

template <class T>
const char* reject(const Pool2dProblem& problem) {
  const Pool2dProblem a = pool_regular(problem);
  if (a.adaptive) return "the adaptive windows have different sizes";
  if (a.x.w != 1 || a.y.w != 1) return "the rows of x and y are not dense";
  if (a.dilation_h != 1 || a.dilation_w != 1) return "average pooling has no dilation";
  if (a.pad_top < 0 || a.pad_left < 0) return "the padding is negative";
  if (pool_has_empty_window(a)) return "a window lies wholly in the padding";
  if (scratch_bytes<T>(phase_layout<T>(a)) > kMostScratch) return "one row exceeds the L2";
  return nullptr;
}

// Per output row, as measured (AVX-512): 50 cycles, R loads and a split for each vector of columns, S taps and a division for
// each vector of outputs. Rows shorter than a vector waste lanes.
template <class T>
double cost(const Pool2dProblem& problem, const Machine& machine) {
  const Pool2dProblem a = pool_regular(problem);
  const double columns = double(pool_ceil_div(phase_layout<T>(a).columns, kLanes<T>)),
               vectors = double(pool_ceil_div(a.Q, kLanes<T>));
  const double split = a.stride_w < 3 ? 3.0 : 3.0 * kLanes<T>;
  return pool_seconds(double(a.N * a.C * a.P) * (50 + columns * (split + double(a.R)) + vectors * (8 + double(a.S))), machine);
}

template <class T>
int64_t workspace(const Pool2dProblem& problem, const Machine& machine) {
  const Pool2dProblem a = pool_regular(problem);
  return shared_bytes<T>(a) + machine.threads * scratch_bytes<T>(phase_layout<T>(a));
}

template <class T>
constexpr Kernel<Pool2dProblem> kKernel = {1.0f, reject<T>, cost<T>, workspace<T>, run<T>};

}  // namespace

extern constinit const Kernel<Pool2dProblem> avg_pool2d_fwd_rows_f32 = kKernel<float>;
extern constinit const Kernel<Pool2dProblem> avg_pool2d_fwd_rows_f64 = kKernel<double>;

}  // namespace fastconv::FASTCONV_TARGET

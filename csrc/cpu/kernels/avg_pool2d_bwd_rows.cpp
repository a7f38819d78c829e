// avg_pool2d_bwd.rows: NCHW. The windows that cover a row of x are added up down the column first, then spread along the row.
//
// Gathered, not scattered: x is written once and never read, and any share of the rows gives the same bits.
#include "cpu/blocks/parallel.h"
#include "cpu/blocks/pool_rows.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- tile: one row of column sums with zeros on both sides, wide enough that whole vectors of x may read past its ends; in L1.
struct Layout {
  int64_t lead, size;
};
template <class T>
FC_INLINE Layout make_layout(const Pool2dProblem& a) {
  if (a.adaptive) return {0, pool_round_up(a.Q, kLanes<T>)};
  const int64_t lead = pool_ceil_div(a.S - 1, a.stride_w);
  const int64_t reach = (pool_round_up(a.W, 2 * kLanes<T>) + a.pad_left) / a.stride_w + 1;
  const int64_t past_q = pool_round_up(a.Q, kLanes<T>);
  return {lead, pool_round_up(lead + (reach > past_q ? reach : past_q) + kLanes<T>, kLanes<T>)};
}

// What all threads read.
template <class T>
struct Tables {
  T *rows, *cols;  // (P), (Q up to whole vectors): what a window counts along one axis
  PoolCovers covers;
};
template <class T>
FC_INLINE int64_t table_bytes(const Pool2dProblem& a) {
  const int64_t counts = pool_round_up(a.P, kLanes<T>) + pool_round_up(a.Q, kLanes<T>);
  return pool_round_up(counts * int64_t(sizeof(T)) + PoolCovers::bytes(a), 64);
}
template <class T>
FC_INLINE Tables<T> make_tables(const Pool2dProblem& a, char* memory) {
  Tables<T> t;
  const int64_t q_size = pool_round_up(a.Q, kLanes<T>), p_size = pool_round_up(a.P, kLanes<T>);
  t.cols = reinterpret_cast<T*>(memory);
  t.rows = t.cols + q_size;
  t.covers = pool_covers(a, t.rows + p_size);
  fill(t.cols, q_size, T(1));
  const bool fixed = a.divisor_override != 0;
  for (int64_t p = 0; p < a.P; ++p) t.rows[p] = fixed ? T(a.divisor_override) : T(pool_count(a, pool_window(pool_axis_h(a), p)));
  for (int64_t q = 0; q < a.Q; ++q) t.cols[q] = fixed ? T(1) : T(pool_count(a, pool_window(pool_axis_w(a), q)));
  return t;
}

// --- transform: down the column. Where the windows' rows all count the same, the sum is divided, once.
template <class T>
FC_INLINE void transform(const Pool2dProblem& a, const Tables<T>& t, const T* plane, const PoolCover& ps, T* sums) {
  bool same = true;
  for (int64_t p = ps.begin + 1; p < ps.end; ++p) same &= t.rows[p] == t.rows[ps.begin];
  for (int64_t q = 0; q < a.Q; q += kLanes<T>) {
    const int n = int(a.Q - q < kLanes<T> ? a.Q - q : kLanes<T>);
    const vec<T> cols = load(t.cols + q);
    vec<T> sum = zero<T>();
    for (int64_t p = ps.begin; p < ps.end; ++p) {
      const vec<T> y = load_up_to(plane + p * a.y.h + q, n);
      sum = sum + (same ? y : y / (set1(t.rows[p]) * cols));
    }
    if (same && ps.begin < ps.end) sum = sum / (set1(t.rows[ps.begin]) * cols);
    store(sums + q, sum);
  }
}

// --- reduce: along the row. Column w of x is covered by the windows q with 0 <= w + pad - q*stride < S; the columns of one
// phase, (w + pad) % stride, take the same taps at consecutive q.
template <class T>
FC_INLINE vec<T> gather(const T* sums, int64_t q, int64_t taps) {
  vec<T> sum = load(sums + q - (taps - 1));
  for (int64_t i = taps - 2; i >= 0; --i) sum = sum + load(sums + q - i);
  return sum;
}
template <class T>
FC_INLINE void reduce(const Pool2dProblem& a, const Tables<T>& t, const T* sums, T* x) {
  constexpr int kL = kLanes<T>;
  if (!a.adaptive && a.stride_w == 1) {
    for (int64_t w = 0; w < a.W; w += kL) store_up_to(x + w, gather(sums, w + a.pad_left, a.S), int(a.W - w < kL ? a.W - w : kL));
  } else if (!a.adaptive && a.stride_w == 2 && a.S > 1) {
    const int64_t pad = a.pad_left, even_taps = (a.S - pad % 2 + 1) / 2, odd_taps = (a.S - (pad + 1) % 2 + 1) / 2;
    for (int64_t w = 0; w < a.W; w += 2 * kL) {
      const int n = int(a.W - w < 2 * kL ? a.W - w : 2 * kL);
      vec<T> first, second;
      interleave(gather(sums, (w + pad) / 2, even_taps), gather(sums, (w + pad + 1) / 2, odd_taps), first, second);
      store_up_to(x + w, first, n);
      if (n > kL) store_up_to(x + w + kL, second, n - kL);
    }
  } else {
    PoolCover held{-1, -1};
    T sum = 0;
    for (int64_t w = 0; w < a.W; ++w) {
      const PoolCover qs = t.covers.cols[w];
      if (qs.begin != held.begin || qs.end != held.end) {
        held = qs;
        sum = 0;
        for (int64_t q = qs.begin; q < qs.end; ++q) sum += sums[q];
      }
      x[w] = sum;
    }
  }
}

// --- run: one task is one row of x. Rows under the same windows are the same row, and copied.
template <class T>
void run(const Pool2dProblem& problem, const Pool2dArgs& args, const Context& context) {
  const Pool2dProblem a = pool_regular(problem);
  const Layout layout = make_layout<T>(a);
  const Tables<T> tables = make_tables<T>(a, static_cast<char*>(context.workspace));
  T* const all_sums = reinterpret_cast<T*>(static_cast<char*>(context.workspace) + table_bytes<T>(a));

  parallel_ranges(context, a.N * a.C * a.H, [&](int thread, int64_t begin, int64_t end) {
    T* const sums = all_sums + thread * layout.size + layout.lead;
    fill(sums - layout.lead, layout.size, T(0));
    PoolPlace at(begin, a.C, a.H);
    PoolCover held{-1, -1};
    for (int64_t task = begin; task < end; ++task, at.advance(a.C, a.H)) {
      const PoolCover ps = tables.covers.rows[at.row];
      T* x = static_cast<T*>(args.x) + at.n * a.x.n + at.c * a.x.c + at.row * a.x.h;
      if (at.row > 0 && ps.begin == held.begin && ps.end == held.end) {
        const T* above = x - a.x.h;
        for (int64_t w = 0; w < a.W; w += kLanes<T>) {
          const int n = int(a.W - w < kLanes<T> ? a.W - w : kLanes<T>);
          store_up_to(x + w, load_up_to(above + w, n), n);
        }
        continue;
      }
      held = ps;
      transform(a, tables, static_cast<const T*>(args.y) + at.n * a.y.n + at.c * a.y.c, ps, sums);
      reduce(a, tables, sums, x);
    }
  });
}

// --- contract
constexpr int64_t kMostScratch = 512 * 1024;  // half of the smallest L2 that has AVX-512

template <class T>
const char* reject(const Pool2dProblem& problem) {
  const Pool2dProblem a = pool_regular(problem);
  if (a.x.w != 1 || a.y.w != 1) return "the rows of x and y are not dense";
  if (a.dilation_h != 1 || a.dilation_w != 1) return "average pooling has no dilation";
  if (a.pad_top < 0 || a.pad_left < 0) return "the padding is negative";
  if (make_layout<T>(a).size * int64_t(sizeof(T)) > kMostScratch) return "one row exceeds the L2";
  return nullptr;
}

// Per row of x, as measured (AVX-512): 40 cycles, the windows that cover it for each vector of y, S / stride additions for each
// vector of x or, where the stride is neither 1 nor 2, two cycles for each element.
template <class T>
double cost(const Pool2dProblem& problem, const Machine& machine) {
  const Pool2dProblem a = pool_regular(problem);
  const double windows = pool_taps_h(a) * double(a.P) / double(a.H);
  const double down = double(pool_ceil_div(a.Q, kLanes<T>)) * (8 + 1.5 * windows);
  const bool vectors = !a.adaptive && a.stride_w < 3;
  const double along = vectors ? double(pool_ceil_div(a.W, kLanes<T>)) * (4 + double(a.S) / double(a.stride_w)) : 2 * double(a.W);
  return pool_seconds(double(a.N * a.C * a.H) * (40 + down + along), machine);
}

template <class T>
int64_t workspace(const Pool2dProblem& problem, const Machine& machine) {
  const Pool2dProblem a = pool_regular(problem);
  return table_bytes<T>(a) + machine.threads * make_layout<T>(a).size * int64_t(sizeof(T));
}

template <class T>
constexpr Kernel<Pool2dProblem> kKernel = {1.0f, reject<T>, cost<T>, workspace<T>, run<T>};

}  // namespace

extern constinit const Kernel<Pool2dProblem> avg_pool2d_bwd_rows_f32 = kKernel<float>;
extern constinit const Kernel<Pool2dProblem> avg_pool2d_bwd_rows_f64 = kKernel<double>;

}  // namespace fastconv::FASTCONV_TARGET

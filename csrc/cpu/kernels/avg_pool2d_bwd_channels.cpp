// avg_pool2d_bwd.channels: NHWC. Vectors run along the channels; each position of x gathers the windows that cover it.
//
// Gathered, not scattered: x is written once and never read, and any share of the rows gives the same bits.
#include "cpu/blocks/parallel.h"
#include "cpu/blocks/pool_window.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- tile: kVectors vectors of channels of one position: 4 sums + 1 divisor of 16 registers.
constexpr int kVectors = 4;

// --- transform: what every window counts, and which windows cover a column.
struct Tables {
  int64_t *rows, *cols;  // (P), (Q): counts along one axis
  PoolCover* covers;     // (W)
};
FC_INLINE int64_t table_bytes(const Pool2dProblem& a) {
  return (a.P + a.Q) * int64_t(sizeof(int64_t)) + a.W * int64_t(sizeof(PoolCover));
}
FC_INLINE Tables make_tables(const Pool2dProblem& a, void* memory) {
  Tables t;
  t.rows = static_cast<int64_t*>(memory);
  t.cols = t.rows + a.P;
  t.covers = reinterpret_cast<PoolCover*>(t.cols + a.Q);
  const bool fixed = a.divisor_override != 0;
  for (int64_t p = 0; p < a.P; ++p) t.rows[p] = fixed ? a.divisor_override : pool_count(a, pool_window(pool_axis_h(a), p));
  for (int64_t q = 0; q < a.Q; ++q) t.cols[q] = fixed ? 1 : pool_count(a, pool_window(pool_axis_w(a), q));
  for (int64_t w = 0; w < a.W; ++w) t.covers[w] = pool_cover(pool_axis_w(a), w);
  return t;
}
FC_INLINE bool same_counts(const int64_t* counts, const PoolCover& cover) {
  for (int64_t i = cover.begin + 1; i < cover.end; ++i) {
    if (counts[i] != counts[cover.begin]) return false;
  }
  return true;
}

// --- reduce: the windows ps x qs of y (at the plane's origin) for kV vectors. Where all divide by the same, the sum is divided,
// once.
template <int kV, class T>
FC_INLINE void reduce(const Pool2dProblem& a, const Tables& t, const T* y, const PoolCover& ps, const PoolCover& qs,
                      bool same_rows, vec<T> (&sum)[kV], int n) {
  constexpr int kL = kLanes<T>;
#pragma GCC unroll 4
  for (int v = 0; v < kV; ++v) sum[v] = zero<T>();
  if (ps.begin >= ps.end || qs.begin >= qs.end) return;
  const bool same = same_rows && same_counts(t.cols, qs);
  for (int64_t p = ps.begin; p < ps.end; ++p) {
    for (int64_t q = qs.begin; q < qs.end; ++q) {
      const T* from = y + p * a.y.h + q * a.y.w;
      const vec<T> divisor = set1(same ? T(1) : T(t.rows[p] * t.cols[q]));
#pragma GCC unroll 4
      for (int v = 0; v < kV; ++v) {
        const vec<T> gradient = kV > 1 || n == kL ? load(from + v * kL) : load(from, n);
        sum[v] = sum[v] + (same ? gradient : gradient / divisor);
      }
    }
  }
  if (same) {
    const vec<T> divisor = set1(T(t.rows[ps.begin] * t.cols[qs.begin]));
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) sum[v] = sum[v] / divisor;
  }
}

// One row of x. Neighbours under the same windows have the same gradient, which is then only stored.
template <int kV, class T>
FC_INLINE void reduce_row(const Pool2dProblem& a, const Tables& t, const T* y, const PoolCover& ps, bool same_rows, T* x, int n) {
  constexpr int kL = kLanes<T>;
  vec<T> sum[kV];
  PoolCover held{-1, -1};
  for (int64_t w = 0; w < a.W; ++w) {
    const PoolCover qs = t.covers[w];
    if (qs.begin != held.begin || qs.end != held.end) {
      reduce<kV>(a, t, y, ps, qs, same_rows, sum, n);
      held = qs;
    }
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) {
      if (kV > 1 || n == kL) {
        store(x + w * a.x.w + v * kL, sum[v]);
      } else {
        store(x + w * a.x.w, sum[v], n);
      }
    }
  }
}

// --- run: one task is one block of channels of one row of x.
template <class T>
void run(const Pool2dProblem& a, const Pool2dArgs& args, const Context& context) {
  constexpr int64_t kBlock = kVectors * kLanes<T>;
  const Tables tables = make_tables(a, context.workspace);
  const int64_t blocks = pool_ceil_div(a.C, kBlock);
  parallel_ranges(context, a.N * a.H * blocks, [&](int, int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task % blocks, h = task / blocks % a.H, n = task / blocks / a.H;
      const PoolCover ps = pool_cover(pool_axis_h(a), h);
      const bool same_rows = same_counts(tables.rows, ps);
      const int64_t c_end = a.C < (block + 1) * kBlock ? a.C : (block + 1) * kBlock;
      for (int64_t c = block * kBlock; c < c_end;) {
        const T* y = static_cast<const T*>(args.y) + n * a.y.n + c;
        T* x = static_cast<T*>(args.x) + n * a.x.n + h * a.x.h + c;
        if (c_end - c == kBlock) {
          reduce_row<kVectors>(a, tables, y, ps, same_rows, x, int(kBlock));
          c += kBlock;
        } else {
          const int lanes = int(c_end - c < kLanes<T> ? c_end - c : kLanes<T>);
          reduce_row<1>(a, tables, y, ps, same_rows, x, lanes);
          c += lanes;
        }
      }
    }
  });
}

// --- contract
const char* reject(const Pool2dProblem& a) {
  if (a.x.c != 1 || a.y.c != 1) return "the channels of x and y are not dense";
  if (a.dilation_h != 1 || a.dilation_w != 1) return "average pooling has no dilation";
  return nullptr;
}

// Per vector of channels: a load and an addition for each window that covers the position, 12 cycles for the rest.
template <class T>
double cost(const Pool2dProblem& a, const Machine& machine) {
  const double windows = pool_taps_h(a) * pool_taps_w(a) * double(a.P * a.Q) / double(a.H * a.W);
  const double vectors = double(a.N * a.H * a.W) * double(pool_ceil_div(a.C, kLanes<T>));
  return pool_seconds(vectors * (12 + windows), machine);
}

int64_t workspace(const Pool2dProblem& a, const Machine&) { return table_bytes(a); }

template <class T>
constexpr Kernel<Pool2dProblem> kKernel = {1.0f, reject, cost<T>, workspace, run<T>};

}  // namespace

extern constinit const Kernel<Pool2dProblem> avg_pool2d_bwd_channels_f32 = kKernel<float>;
extern constinit const Kernel<Pool2dProblem> avg_pool2d_bwd_channels_f64 = kKernel<double>;

}  // namespace fastconv::FASTCONV_TARGET

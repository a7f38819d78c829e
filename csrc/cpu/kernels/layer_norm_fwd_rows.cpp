// layer_norm_fwd.rows: a row at a time, in three passes over it while it lies in the L1.
//
// The variance is a sum of squared distances from the mean and not a difference of two averages, which cancels. The mean itself
// is rounded, by 6e-5 for floats around 1000: the second pass also sums the distances, whose average is what the rounding left
// out.
#include "cpu/blocks/norm_row.h"
#include "cpu/blocks/parallel.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- tile: nothing is kept in registers but the sums of a pass, eight vectors. A row of 768 floats is 3 KB, with residual, sum,
// gamma, beta and y 18 KB of an L1 of 32; its three passes cost 24 + 48 + 96 cycles of load ports and about 60 of latency.

// Rows go through each pass together: a sum across lanes, a division and a root take 150 cycles before the next pass can begin,
// which the other rows fill. Four of 768 floats are 12 KB of the L1, with a residual 48 of which the second pass reads 12.
constexpr int64_t kRows = 4;
// A task is at least this many numbers, 2 us of work, so that small layers do not wake a thread.
constexpr int64_t kTaskNumbers = 16384;

// --- transform: the residual is added on the way of the first pass, which writes the sum.
template <class T>
struct AddUp {
  const T *x, *residual;
  T* sum;
  FC_INLINE void operator()(int64_t c, int n, vec<T>& a, vec<T>&) const {
    vec<T> s = load_some(x + c, n);
    if (residual) {
      s = s + load_some(residual + c, n);
      store_some(sum + c, s, n);
    }
    a = a + s;
  }
};

// --- reduce: distances from the mean, and their squares.
template <class T>
struct Spread {
  const T* s;
  vec<T> mean;
  FC_INLINE void operator()(int64_t c, int n, vec<T>& a, vec<T>& b) const {
    vec<T> d = load_some(s + c, n) - mean;
    if (n < kLanes<T>) d = blend(first_lanes<T>(n), d, zero<T>());
    a = a + d;
    b = fma(d, d, b);
  }
};

template <class T>
FC_INLINE vec<T> affine(vec<T> h, const T* gamma, const T* beta, int64_t c, int n) {
  if (gamma && beta) return fma(h, load_some(gamma + c, n), load_some(beta + c, n));
  if (gamma) return h * load_some(gamma + c, n);
  return beta ? h + load_some(beta + c, n) : h;
}

// One row between its passes.
template <class T>
struct Row {
  const T *x, *residual, *s;
  T *sum, *y, mean, rest, rstd;
};

template <class T>
FC_INLINE void add_up(const NormProblem& a, const NormArgs& args, int64_t n, Row<T>& row) {
  row.x = static_cast<const T*>(args.x) + n * a.C;
  row.residual = args.residual ? static_cast<const T*>(args.residual) + n * a.C : nullptr;
  row.sum = args.residual ? static_cast<T*>(args.sum) + n * a.C : nullptr;
  row.y = static_cast<T*>(args.y) + n * a.C;
  row.s = row.residual ? row.sum : row.x;
  T total, unused;
  sum_row<T>(a.C, AddUp<T>{row.x, row.residual, row.sum}, total, unused);
  row.mean = total / T(a.C);
}

template <class T>
FC_INLINE void spread(const NormProblem& a, const NormArgs& args, int64_t n, Row<T>& row) {
  T distance, squares;
  sum_row<T>(a.C, Spread<T>{row.s, set1(row.mean)}, distance, squares);
  row.rest = distance / T(a.C);
  const double variance = double(squares) / double(a.C) - double(row.rest) * double(row.rest);
  row.rstd = T(1.0 / __builtin_sqrt((variance < 0 ? 0 : variance) + a.eps));
  if (args.mean) {
    static_cast<T*>(args.mean)[n] = row.mean + row.rest;
    static_cast<T*>(args.rstd)[n] = row.rstd;
  }
}

template <class T>
FC_INLINE void normalise(const NormProblem& a, const NormArgs& args, const Row<T>& row) {
  constexpr int kL = kLanes<T>;
  const T *gamma = static_cast<const T*>(args.gamma), *beta = static_cast<const T*>(args.beta);
  const vec<T> mean = set1(row.mean), rest = set1(row.rest), rstd = set1(row.rstd);
  int64_t c = 0;
  for (; c + kL <= a.C; c += kL) {
    const vec<T> h = ((load(row.s + c) - mean) - rest) * rstd;
    store(row.y + c, affine(h, gamma, beta, c, kL));
  }
  if (c < a.C) {
    const int n = int(a.C - c);
    const vec<T> h = ((load(row.s + c, n) - mean) - rest) * rstd;
    store(row.y + c, affine(h, gamma, beta, c, n), n);
  }
}

// --- run
template <class T>
void run(const NormProblem& a, const NormArgs& args, const Context& context) {
  const EvenSplit rows(a.N, a.C < kTaskNumbers ? kTaskNumbers / a.C : 1);
  parallel_ranges(context, rows.parts, [&](int, int64_t begin, int64_t end) {
    for (int64_t first = rows.begin(begin); first < rows.begin(end); first += kRows) {
      const int64_t rest = rows.begin(end) - first, count = rest < kRows ? rest : kRows;
      Row<T> some[kRows];
      for (int64_t i = 0; i < count; ++i) add_up<T>(a, args, first + i, some[i]);
      for (int64_t i = 0; i < count; ++i) spread<T>(a, args, first + i, some[i]);
      for (int64_t i = 0; i < count; ++i) normalise<T>(a, args, some[i]);
    }
  });
}

// --- contract
const char* reject(const NormProblem& a) {
  if (a.N <= 0 || a.C <= 0) return "there is nothing to normalise";
  return nullptr;
}

// Four cycles a vector for three passes, 60 a row for two sums across lanes, two divisions and a root.
template <class T>
double cost(const NormProblem& a, const Machine& machine) {
  const double cycles = double(a.N) * (60 + 4 * double((a.C + kLanes<T> - 1) / kLanes<T>));
  return cycles / (3e9 * machine.threads);
}

int64_t workspace(const NormProblem&, const Machine&) { return 0; }

template <class T>
constexpr Kernel<NormProblem> kKernel = {1.0f, reject, cost<T>, workspace, run<T>};

}  // namespace

extern constinit const Kernel<NormProblem> layer_norm_fwd_rows_f32 = kKernel<float>;
extern constinit const Kernel<NormProblem> layer_norm_fwd_rows_f64 = kKernel<double>;

}  // namespace fastconv::FASTCONV_TARGET

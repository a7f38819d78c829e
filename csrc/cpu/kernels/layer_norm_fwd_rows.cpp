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

template <class T>
void normalise(const NormProblem& a, const NormArgs& args, int64_t row) {
  constexpr int kL = kLanes<T>;
  const T* x = static_cast<const T*>(args.x) + row * a.C;
  const T* residual = args.residual ? static_cast<const T*>(args.residual) + row * a.C : nullptr;
  T* sum = args.residual ? static_cast<T*>(args.sum) + row * a.C : nullptr;
  const T *gamma = static_cast<const T*>(args.gamma), *beta = static_cast<const T*>(args.beta);
  T* y = static_cast<T*>(args.y) + row * a.C;

  T total, unused;
  sum_row<T>(a.C, AddUp<T>{x, residual, sum}, total, unused);
  const T* s = residual ? sum : x;
  const T mean = total / T(a.C);
  T distance, squares;
  sum_row<T>(a.C, Spread<T>{s, set1(mean)}, distance, squares);
  const T rest = distance / T(a.C);
  const double variance = double(squares) / double(a.C) - double(rest) * double(rest);
  const T rstd = T(1.0 / __builtin_sqrt((variance < 0 ? 0 : variance) + a.eps));
  if (args.mean) {
    static_cast<T*>(args.mean)[row] = mean + rest;
    static_cast<T*>(args.rstd)[row] = rstd;
  }

  int64_t c = 0;
  for (; c + kL <= a.C; c += kL) {
    const vec<T> h = ((load(s + c) - set1(mean)) - set1(rest)) * set1(rstd);
    store(y + c, affine(h, gamma, beta, c, kL));
  }
  if (c < a.C) {
    const int n = int(a.C - c);
    const vec<T> h = ((load(s + c, n) - set1(mean)) - set1(rest)) * set1(rstd);
    store(y + c, affine(h, gamma, beta, c, n), n);
  }
}

// --- run
template <class T>
void run(const NormProblem& a, const NormArgs& args, const Context& context) {
  const EvenSplit rows(a.N, a.C < kTaskNumbers ? kTaskNumbers / a.C : 1);
  parallel_ranges(context, rows.parts, [&](int, int64_t begin, int64_t end) {
    for (int64_t row = rows.begin(begin); row < rows.begin(end); ++row) normalise<T>(a, args, row);
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

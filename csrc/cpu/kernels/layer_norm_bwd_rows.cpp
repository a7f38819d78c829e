// layer_norm_bwd.rows: the gradient of a row in two passes over it; those of gamma and beta in blocks of rows, which are then
// added.
//
// Where the rows are cut follows from their number alone, and every block is summed in order from zero: threads do not show.
#include "cpu/blocks/norm_row.h"
#include "cpu/blocks/parallel.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- tile: of a row of 768 floats x, dy, dx, gamma and its block's two sums are 18 KB of an L1 of 32.

// At most so many blocks, of at least so many rows: the sums of a block cost as much to clear and to add as one row to compute,
// and 64 blocks of 4096 floats are 2 MB of scratch.
constexpr int64_t kMostBlocks = 64, kLeastRows = 16;

FC_INLINE EvenSplit blocks_of(const NormProblem& a) {
  const int64_t rows = (a.N + kMostBlocks - 1) / kMostBlocks;
  return EvenSplit(a.N, rows < kLeastRows ? kLeastRows : rows);
}

// --- transform: h is computed again from x, mean and rstd, which is cheaper than to have kept it.
template <class T>
struct Row {
  const T *x, *dy, *gamma;
  vec<T> mean, rstd;

  FC_INLINE Row(const NormProblem& a, const NormArgs& args, int64_t row)
      : x(static_cast<const T*>(args.x) + row * a.C),
        dy(static_cast<const T*>(args.dy) + row * a.C),
        gamma(static_cast<const T*>(args.gamma)),
        mean(set1(static_cast<const T*>(args.mean)[row])),
        rstd(set1(static_cast<const T*>(args.rstd)[row])) {}
  FC_INLINE vec<T> h(int64_t c, int n) const { return (load_some(x + c, n) - mean) * rstd; }
  FC_INLINE vec<T> g(int64_t c, int n) const {
    const vec<T> d = load_some(dy + c, n);
    return gamma ? d * load_some(gamma + c, n) : d;
  }
  // Places behind the row have dy = 0.
  FC_INLINE void operator()(int64_t c, int n, vec<T>& a, vec<T>& b) const {
    const vec<T> v = g(c, n);
    a = a + v;
    b = fma(v, h(c, n), b);
  }
};

// --- reduce: the sums of one row.
template <class T>
FC_INLINE void row_gradient(const NormProblem& a, const Row<T>& row, const T* dsum, T* dx) {
  T sum_g, sum_gh;
  sum_row<T>(a.C, row, sum_g, sum_gh);
  const vec<T> g = set1(sum_g / T(a.C)), gh = set1(sum_gh / T(a.C));
  const auto at = [&](int64_t c, int n) {
    const vec<T> d = row.rstd * ((row.g(c, n) - g) - row.h(c, n) * gh);
    store_some(dx + c, dsum ? d + load_some(dsum + c, n) : d, n);
  };
  int64_t c = 0;
  for (; c + kLanes<T> <= a.C; c += kLanes<T>) at(c, kLanes<T>);
  if (c < a.C) at(c, int(a.C - c));
}

// What a row adds to its block's sums, which have whole vectors.
template <class T>
FC_INLINE void add_row(const NormProblem& a, const Row<T>& row, T* gamma, T* beta) {
  const auto at = [&](int64_t c, int n) {
    const vec<T> d = load_some(row.dy + c, n);
    store(gamma + c, fma(d, row.h(c, n), load(gamma + c)));
    store(beta + c, load(beta + c) + d);
  };
  int64_t c = 0;
  for (; c + kLanes<T> <= a.C; c += kLanes<T>) at(c, kLanes<T>);
  if (c < a.C) at(c, int(a.C - c));
}

// --- run: blocks of rows, then columns of all blocks' sums.
template <class T>
void run(const NormProblem& a, const NormArgs& args, const Context& context) {
  const EvenSplit blocks = blocks_of(a);
  const int64_t width = round_up(a.C, kLanes<T>);
  const bool affine = args.dgamma || args.dbeta;
  T* const sums = static_cast<T*>(context.workspace);
  parallel_ranges(context, blocks.parts, [&](int, int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      T *gamma = sums + 2 * block * width, *beta = gamma + width;
      if (affine) __builtin_memset(gamma, 0, size_t(2 * width) * sizeof(T));
      for (int64_t n = blocks.begin(block); n < blocks.begin(block + 1); ++n) {
        const Row<T> row(a, args, n);
        const T* dsum = args.dsum ? static_cast<const T*>(args.dsum) + n * a.C : nullptr;
        if (args.dx) row_gradient(a, row, dsum, static_cast<T*>(args.dx) + n * a.C);
        if (affine) add_row(a, row, gamma, beta);
      }
    }
  });
  if (!affine) return;
  parallel_ranges(context, width / kLanes<T>, [&](int, int64_t begin, int64_t end) {
    for (int64_t c = begin * kLanes<T>; c < end * kLanes<T>; c += kLanes<T>) {
      const int n = a.C - c < kLanes<T> ? int(a.C - c) : kLanes<T>;
      vec<T> gamma = zero<T>(), beta = zero<T>();
      for (int64_t block = 0; block < blocks.parts; ++block) {
        gamma = gamma + load(sums + 2 * block * width + c);
        beta = beta + load(sums + (2 * block + 1) * width + c);
      }
      if (args.dgamma) store(static_cast<T*>(args.dgamma) + c, gamma, n);
      if (args.dbeta) store(static_cast<T*>(args.dbeta) + c, beta, n);
    }
  });
}

// --- contract
const char* reject(const NormProblem& a) {
  if (a.N <= 0 || a.C <= 0) return "there is nothing to normalise";
  return nullptr;
}

// Eight cycles a vector for three passes, 60 a row for two sums across lanes.
template <class T>
double cost(const NormProblem& a, const Machine& machine) {
  const double cycles = double(a.N) * (60 + 8 * double((a.C + kLanes<T> - 1) / kLanes<T>));
  return cycles / (3e9 * machine.threads);
}

template <class T>
int64_t workspace(const NormProblem& a, const Machine&) {
  return blocks_of(a).parts * 2 * round_up(a.C, kLanes<T>) * int64_t(sizeof(T));
}

template <class T>
constexpr Kernel<NormProblem> kKernel = {1.0f, reject, cost<T>, workspace<T>, run<T>};

}  // namespace

extern constinit const Kernel<NormProblem> layer_norm_bwd_rows_f32 = kKernel<float>;
extern constinit const Kernel<NormProblem> layer_norm_bwd_rows_f64 = kKernel<double>;

}  // namespace fastconv::FASTCONV_TARGET

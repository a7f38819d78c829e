// layer_norm_bwd.rows: the gradient of a row by a warp, in two passes over it; those of gamma and beta by columns, in parts of
// the rows that are then added in order.
//
// Where the rows are cut follows from their number alone. h is computed again from x, mean and rstd, which is cheaper than to
// have kept it.
#include "cuda/blocks/norm.h"

namespace fastconv::sm80 {
namespace {

template <class T>
struct Operands {
  const T *x, *gamma, *dy, *dsum;
  const float *mean, *rstd;
  T *dx, *dgamma, *dbeta;
};

// --- tile of the columns' sums: 32 neighbouring columns of 8 rows at a time. Parts of 128 rows and more, so that a thread sums
// 16 or more, and at most 64, which for 4096 columns are 2 MB.
constexpr int kColumns = kWarp, kRows = kNormThreads / kColumns;
constexpr int64_t kLeastRows = 128, kMostParts = 64;

struct Cut {
  int64_t rows, parts;
};

Cut cut(const NormProblem& a) {
  const int64_t even = (a.N + kMostParts - 1) / kMostParts, rows = even < kLeastRows ? kLeastRows : even;
  return {rows, (a.N + rows - 1) / rows};
}

int64_t column_tiles(const NormProblem& a) { return (a.C + kColumns - 1) / kColumns; }

// --- run
template <class T>
__global__ void __launch_bounds__(kNormThreads) row_gradients(NormProblem a, Operands<T> args, bool wide) {
  const int64_t n = norm_row(), C = a.C;
  if (n >= a.N) return;
  const float mean = args.mean[n], rstd = args.rstd[n];
  using Numbers = Pack<float, kWide<T>>;
  // g = dy * gamma and h of the pack at c.
  const auto at = [&](int64_t c, Numbers& g, Numbers& h) {
    g = load_numbers(args.dy + n * C, c, C, wide);
    h = load_numbers(args.x + n * C, c, C, wide);
    if (args.gamma) {
      const Numbers gamma = load_numbers(args.gamma, c, C, wide);
      FC_UNROLL
      for (int i = 0; i < kWide<T>; ++i) g.v[i] *= gamma.v[i];
    }
    FC_UNROLL
    for (int i = 0; i < kWide<T>; ++i) h.v[i] = (h.v[i] - mean) * rstd;
  };
  float sum_g = 0, sum_gh = 0;
  for_packs<T>(C, [&](int64_t c) {
    Numbers g, h;
    at(c, g, h);
    FC_UNROLL
    for (int i = 0; i < kWide<T>; ++i) {
      sum_g += g.v[i];  // behind the row's end g is 0
      sum_gh = fmaf(g.v[i], h.v[i], sum_gh);
    }
  });
  sum_g = add_lanes(sum_g) / float(C);
  sum_gh = add_lanes(sum_gh) / float(C);
  for_packs<T>(C, [&](int64_t c) {
    Numbers g, h;
    at(c, g, h);
    FC_UNROLL
    for (int i = 0; i < kWide<T>; ++i) g.v[i] = rstd * ((g.v[i] - sum_g) - h.v[i] * sum_gh);
    if (args.dsum) {
      const Numbers more = load_numbers(args.dsum + n * C, c, C, wide);
      FC_UNROLL
      for (int i = 0; i < kWide<T>; ++i) g.v[i] += more.v[i];
    }
    store_numbers(args.dx + n * C, c, C, wide, g);
  });
}

struct ColumnSums {
  float gamma[kRows][kColumns], beta[kRows][kColumns];
};

// One part of the rows, for one tile of columns: parts are [part][gamma, beta][C].
template <class T>
__global__ void __launch_bounds__(kNormThreads)
    sum_columns(NormProblem a, Operands<T> args, uint32_t tiles, int64_t rows, float* parts) {
  ColumnSums& shared = shared_memory<ColumnSums>();
  const int64_t part = blockIdx.x / tiles, c = int64_t(blockIdx.x % tiles) * kColumns + threadIdx.x % kColumns;
  const int64_t begin = part * rows, end = begin + rows < a.N ? begin + rows : a.N;
  const int mine = int(threadIdx.x) / kColumns, column = int(threadIdx.x) % kColumns;
  float gamma = 0, beta = 0;
  if (c < a.C) {
    for (int64_t n = begin + mine; n < end; n += kRows) {
      const float dy = to_float(args.dy[n * a.C + c]);
      gamma = fmaf(dy, (to_float(args.x[n * a.C + c]) - args.mean[n]) * args.rstd[n], gamma);
      beta += dy;
    }
  }
  shared.gamma[mine][column] = gamma;
  shared.beta[mine][column] = beta;
  __syncthreads();  // one row of threads adds up what all have
  if (mine != 0 || c >= a.C) return;
  for (int i = 1; i < kRows; ++i) {
    gamma += shared.gamma[i][column];
    beta += shared.beta[i][column];
  }
  parts[2 * part * a.C + c] = gamma;
  parts[(2 * part + 1) * a.C + c] = beta;
}

template <class T>
__global__ void __launch_bounds__(kNormThreads) add_parts(NormProblem a, const float* parts, int64_t count, T* dgamma, T* dbeta) {
  const int64_t c = int64_t(blockIdx.x) * kNormThreads + threadIdx.x;
  if (c >= a.C) return;
  float gamma = 0, beta = 0;
  for (int64_t part = 0; part < count; ++part) {
    gamma += parts[2 * part * a.C + c];
    beta += parts[(2 * part + 1) * a.C + c];
  }
  if (dgamma) dgamma[c] = from_float<T>(gamma);
  if (dbeta) dbeta[c] = from_float<T>(beta);
}

template <class T>
void run(const NormProblem& a, const NormArgs& args, const Context& context) {
  const auto of = [](void* p) { return static_cast<T*>(p); };
  const Operands<T> operands = {of(args.x),
                                of(args.gamma),
                                of(args.dy),
                                of(args.dsum),
                                static_cast<const float*>(args.mean),
                                static_cast<const float*>(args.rstd),
                                of(args.dx),
                                of(args.dgamma),
                                of(args.dbeta)};
  if (args.dx) {
    const bool wide = norm_is_wide<T>(a, {args.x, args.gamma, args.dy, args.dsum, args.dx});
    launch(context, row_gradients<T>, norm_blocks(a), kNormThreads, 0, a, operands, wide);
  }
  if (!args.dgamma && !args.dbeta) return;
  const Cut parts = cut(a);
  float* const scratch = static_cast<float*>(context.workspace);
  launch(context, sum_columns<T>, parts.parts * column_tiles(a), kNormThreads, sizeof(ColumnSums), a, operands,
         uint32_t(column_tiles(a)), parts.rows, scratch);
  launch(context, add_parts<T>, (a.C + kNormThreads - 1) / kNormThreads, kNormThreads, 0, a, scratch, parts.parts,
         of(args.dgamma), of(args.dbeta));
}

// --- contract
int64_t workspace(const NormProblem& a, const Machine&) { return cut(a).parts * 2 * a.C * int64_t(sizeof(float)); }

template <class T>
constexpr Kernel<NormProblem> kKernel = {1.0f, norm_reject, norm_cost<T, 5>, workspace, run<T>};

}  // namespace

extern constinit const Kernel<NormProblem> layer_norm_bwd_rows_f32 = kKernel<float>;
extern constinit const Kernel<NormProblem> layer_norm_bwd_rows_f16 = kKernel<__half>;
extern constinit const Kernel<NormProblem> layer_norm_bwd_rows_bf16 = kKernel<__nv_bfloat16>;

}  // namespace fastconv::sm80

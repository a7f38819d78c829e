// sdpa_bwd.flash: the gradients of attention, each by a pass of its own that computes the weights again from lse. So every number
// is summed by one thread in one order, without atomics, and a pass has the sums of one gradient in its registers.
//
//   tile       64 queries (dq) or 64 keys (dk, dv), which meet the other side tile by tile
//   multiply   s = q k', p = exp2(s - lse), dp = dout v', ds = p (dp - delta); then dv += p' dout, dk += ds' q, dq += ds k
//   run        lse and delta of all rows; dv; dk; dq, and with it the gradient of a mask; that of a bias along its distances
//
// docs/kernels/cuda.md has the reasons. (Dao et al. 2022, algorithm 4.)
#include "cuda/blocks/attention_simt.h"
#include "cuda/blocks/attention_tensor.h"

namespace fastconv::sm80 {
namespace {

enum class Gradient { query, key, value, bias };

// What a row has besides its scores.
struct RowSums {
  float *lse, *delta;  // [B*Hq*Lq]: in units of log 2, +inf where nothing is seen; sum(dout * out) - dlse
};

constexpr int kRowThreads = 256;

// A warp for each row.
template <class T>
__global__ void sum_rows(AttentionCall t, RowSums sums, int64_t rows) {
  const int64_t place = int64_t(blockIdx.x) * (kRowThreads / kWarp) + threadIdx.x / kWarp;
  if (place >= rows) return;
  const int64_t i = place % t.a.Lq, h = place / t.a.Lq % t.a.Hq, b = place / t.a.Lq / t.a.Hq;
  const T* dout = static_cast<const T*>(t.args.dout) + b * t.a.dout.b + h * t.a.dout.h + i * t.a.dout.l;
  const T* out = static_cast<const T*>(t.args.out) + b * t.a.out.b + h * t.a.out.h + i * t.a.out.l;
  float sum = 0;
  for (int64_t d = threadIdx.x % kWarp; d < t.a.Dv; d += kWarp) {
    sum = fmaf(to_float(dout[d * t.a.dout.d]), to_float(out[d * t.a.out.d]), sum);
  }
  FC_UNROLL
  for (int bits = 1; bits < kWarp; bits *= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, bits);
  if (threadIdx.x % kWarp != 0) return;
  const float lse = static_cast<const float*>(t.args.lse)[place];
  sums.delta[place] = sum - (t.args.dlse ? static_cast<const float*>(t.args.dlse)[place] : 0.0f);
  sums.lse[place] = lse == minus_infinity() ? __builtin_inff() : lse * kLog2e;
}

// --- multiply

struct GradientQuery : Query {
  float lse, delta;
  int64_t place;
};

FC_DEVICE GradientQuery gradient_query(const AttentionCall& t, AttentionUnit u, int r, const RowSums& sums) {
  const int64_t place = query_place(t, u, r);
  return {query(t, u, r), place < 0 ? __builtin_inff() : sums.lse[place], place < 0 ? 0 : sums.delta[place], place};
}

template <class Tiles, Gradient kOf>
struct Shared {
  static constexpr bool kByKey = kOf == Gradient::key || kOf == Gradient::value;
  typename Tiles::Shared tiles;
  GradientQuery queries[kByKey ? 2 : 1][kByKey ? Tiles::kN : Tiles::kM];  // of the fixed tile, or of each stage
};

// Products of the fixed rows from `first` on and the moving ones from `n` on become weights, after dropout (value), or gradients
// of scores, of the product (query, key) or of what was added to it (bias).
template <Gradient kOf, class Tiles>
FC_DEVICE void differentiate(const AttentionCall& t, const GradientQuery* queries, int first, int n,
                             typename Tiles::Weights& weights, typename Tiles::Weights& dp) {
  constexpr bool kByKey = kOf == Gradient::key || kOf == Gradient::value;
  FC_UNROLL
  for (int r = 0; r < Tiles::kRows; ++r) {
    FC_UNROLL
    for (int c = 0; c < Tiles::kColumns; ++c) {
      const GradientQuery& q = queries[kByKey ? Tiles::column(c) : Tiles::row(r)];
      const int j = kByKey ? first + Tiles::row(r) : n + Tiles::column(c);
      float &x = weights.at(r, c), slope = 1;
      const bool seen = q.sees(j);
      const float weight = seen ? exp2f(score<typename Tiles::T>(t, q, j, x, slope) - q.lse) : 0;
      const float factor = kept(t, q, j);
      if constexpr (kOf == Gradient::value) {
        x = weight * factor;
      } else {
        const float ds = seen ? weight * (dp.at(r, c) * factor - q.delta) : 0;
        if (kOf == Gradient::query && t.args.dmask && q.place >= 0 && j < t.a.Lkv) {
          static_cast<float*>(t.args.dmask)[q.place * t.a.Lkv + j] = ds;
        }
        x = kOf == Gradient::bias ? ds : ds * slope;
      }
    }
  }
}

// The gradient of a mask where no query of the block's tile sees a key of the other.
template <class Tiles>
FC_DEVICE void clear_mask_gradient(const AttentionCall& t, const GradientQuery* queries, int n) {
  for (int at = int(threadIdx.x); at < Tiles::kM * Tiles::kN; at += Tiles::kThreads) {
    const int64_t place = queries[at / Tiles::kN].place, j = n + at % Tiles::kN;
    if (place >= 0 && j < t.a.Lkv) static_cast<float*>(t.args.dmask)[place * t.a.Lkv + j] = 0;
  }
}

// --- run

// One block of a multiprocessor is enough to ask for: aiming at three by itself, ptxas spills at 128 features, where shared
// memory has room for two.
template <class Tiles, Gradient kOf>
__global__ void __launch_bounds__(Tiles::kThreads, 1) flash(AttentionCall t, RowSums sums) {
  using T = typename Tiles::T;
  constexpr bool kByKey = Shared<Tiles, kOf>::kByKey;
  Shared<Tiles, kOf>& shared = shared_memory<Shared<Tiles, kOf>>();
  uint32_t tile = blockIdx.x;
  const AttentionUnit u = attention_unit(t, t.units.take(tile));
  // Under a causal mask the first keys meet most queries, and the last queries most keys: they begin first.
  const int64_t place = kByKey ? tile : tiles_of(t.rows, Tiles::kM) - 1 - tile;
  const int first = int(place) * Tiles::kM, end = kByKey ? t.rows : int(t.a.Lkv);
  const UnitRows<const T> of_queries[] = {query_rows<const T>(t, u, t.args.q, t.a.q, t.a.D, t.packs_q),
                                          query_rows<const T>(t, u, t.args.dout, t.a.dout, t.a.Dv, t.packs_dout)};
  const UnitRows<const T> of_keys[] = {key_rows<const T>(t, u, t.args.k, t.a.k, t.a.D, t.packs_k),
                                       key_rows<const T>(t, u, t.args.v, t.a.v, t.a.Dv, t.packs_v)};
  Tiles tiles(shared.tiles, kByKey ? of_keys : of_queries, first, kByKey ? of_queries : of_keys);
  if (!kByKey && threadIdx.x < Tiles::kM) {
    shared.queries[0][threadIdx.x] = gradient_query(t, u, first + int(threadIdx.x), sums);
  }
  const auto meets = [&](int n) {
    return kByKey ? meet(t, n, Tiles::kN, first, Tiles::kM) : meet(t, first, Tiles::kM, n, Tiles::kN);
  };
  const auto meeting_from = [&](int n) {
    while (n < end && !meets(n)) n += Tiles::kN;
    return n;
  };
  const auto begin = [&](int n, int stage) {
    tiles.start(n, stage);
    if (kByKey && threadIdx.x < Tiles::kN) {
      shared.queries[stage][threadIdx.x] = gradient_query(t, u, n + int(threadIdx.x), sums);
    }
  };
  if (kOf == Gradient::query && t.args.dmask) {
    __syncthreads();  // every thread asks for all rows' places
    for (int n = 0; n < end; n += Tiles::kN) {
      if (!meets(n)) clear_mask_gradient<Tiles>(t, shared.queries[0], n);
    }
  }

  typename Tiles::Sums gradient;
  int n = meeting_from(0), stage = 0;
  if (n < end) begin(n, stage);
  while (n < end) {
    tiles.arrive();
    __syncthreads();  // this tile is there, and the one before it has been multiplied
    const int following = meeting_from(n + Tiles::kN);
    if (following < end) begin(following, 1 - stage);
    typename Tiles::Weights weights, dp;
    tiles.multiply(weights, 0, 0, n, stage);
    if constexpr (kOf != Gradient::value) tiles.multiply(dp, 1, 1, n, stage);
    differentiate<kOf, Tiles>(t, shared.queries[kByKey ? stage : 0], first, n, weights, dp);
    tiles.accumulate(gradient, weights, kOf == Gradient::value ? 1 : 0, n, stage);
    n = following;
    stage = 1 - stage;
  }
  tiles.arrive();  // where nothing is seen, the fixed tiles are still on their way

  const UnitRows<T> target = kOf == Gradient::query ? query_rows<T>(t, u, t.args.dq, t.a.dq, t.a.D, false)
                             : kOf == Gradient::key ? key_rows<T>(t, u, t.args.dk, t.a.dk, t.a.D, false)
                                                    : key_rows<T>(t, u, t.args.dv, t.a.dv, t.a.Dv, false);
  FC_UNROLL
  for (int r = 0; r < Tiles::kRows; ++r) {
    const int row = first + Tiles::row(r);
    if (!target.has(row)) continue;
    T* to = target.at(row);
    FC_UNROLL
    for (int c = 0; c < Tiles::kFeatures; ++c) {
      const int d = Tiles::feature(c);
      const float sum = gradient.at(r, c);
      if (d < target.features) to[d * target.feature] = from_float<T>(kOf == Gradient::value ? sum : sum * t.scale);
    }
  }
}

// The gradient of the bias: 64 distances of one head, which 64 queries meet at 127 keys. In fp32 whatever is stored, for it is
// wanted for a table of numbers that are fp32 too.
template <class T>
using BiasTiles = SimtTiles<T, SimtTile::kN, 2, 2>;

template <class T>
__global__ void __launch_bounds__(SimtTile::kThreads) along_distances(AttentionCall t, Divisor tiles_of_head, RowSums sums) {
  using Tiles = BiasTiles<T>;
  auto& shared = shared_memory<Shared<Tiles, Gradient::bias>>();
  GradientQuery* const queries = shared.queries[0];
  uint32_t bh = blockIdx.x;
  const int64_t distances = t.a.Lq + t.a.Lkv - 1, group = t.a.Hq / t.a.Hkv;
  const int64_t first_distance = int64_t(tiles_of_head.take(bh)) * Tiles::kN;
  const AttentionUnit u = {bh / t.a.Hq, bh % t.a.Hq / group};
  const int before = int(bh % t.a.Hq % group * t.a.Lq), count = int(t.a.Lq);  // rows of the unit, of the head
  UnitRows<const T> of_queries[] = {query_rows<const T>(t, u, t.args.q, t.a.q, t.a.D, false),
                                    query_rows<const T>(t, u, t.args.dout, t.a.dout, t.a.Dv, false)};
  for (UnitRows<const T>& rows : of_queries) rows.count = before + count;
  const UnitRows<const T> of_keys[] = {key_rows<const T>(t, u, t.args.k, t.a.k, t.a.D, false),
                                       key_rows<const T>(t, u, t.args.v, t.a.v, t.a.Dv, false)};
  const int mine = int(threadIdx.x);  // distance, of the first kN threads
  float sum = 0;
  for (int i = 0; i < count; i += Tiles::kM) {
    const int rows = count - i < Tiles::kM ? count - i : Tiles::kM;
    Tiles tiles(shared.tiles, of_queries, before + i, of_keys);
    if (mine < Tiles::kM) queries[mine] = gradient_query(t, u, mine < rows ? before + i + mine : t.rows, sums);
    for (int half = 0; half < 2; ++half) {
      const int64_t key = i + first_distance - (t.a.Lq - 1) + half * Tiles::kN;
      if (key >= t.a.Lkv || !meet(t, before + i, rows, int(key), Tiles::kN)) continue;
      __syncthreads();  // the queries are there, and the sums before have been added
      typename Tiles::Weights weights, dp;
      tiles.multiply(weights, 0, 0, int(key), 0);
      tiles.multiply(dp, 1, 1, int(key), 0);
      differentiate<Gradient::bias, Tiles>(t, queries, before + i, int(key), weights, dp);
      tiles.put(weights);
      if (mine >= Tiles::kN) continue;
      float part = 0;
      for (int m = 0; m < rows; ++m) {
        const int column = m + mine - half * Tiles::kN;
        if (column >= 0 && column < Tiles::kN) part += shared.tiles.weights[m][column];
      }
      sum += part;
    }
  }
  if (mine < Tiles::kN && first_distance + mine < distances) {
    static_cast<float*>(t.args.dbias)[int64_t(bh) * distances + first_distance + mine] = sum;
  }
}

int64_t all_rows(const SdpaProblem& a) { return a.B * a.Hq * a.Lq; }

template <class Tiles, Gradient kOf>
void start(const AttentionCall& t, const RowSums& sums, const Context& context) {
  static_assert(sizeof(Shared<Tiles, kOf>) <= kSharedAtMost);
  const int64_t tiles = tiles_of(Shared<Tiles, kOf>::kByKey ? t.a.Lkv : t.rows, Tiles::kM);
  launch(context, flash<Tiles, kOf>, t.a.B * t.a.Hkv * tiles, Tiles::kThreads, sizeof(Shared<Tiles, kOf>), t, sums);
}

// One fixed tile serves the values' gradient, which needs no dp.
template <class One, class Two>
void start_all(const AttentionCall& t, const RowSums& sums, const Context& context) {
  start<One, Gradient::value>(t, sums, context);
  start<Two, Gradient::key>(t, sums, context);
  start<Two, Gradient::query>(t, sums, context);
}

// --- tile: two fixed tiles of 64 rows and two stages of two moving ones, of 64 rows where there are 64 features (54 KB), of 32
// where there are 128 (67 KB), of 16 where there are 256 (99 KB).
template <class T>
void run(const SdpaProblem& a, const SdpaArgs& args, const Context& context) {
  const AttentionCall t = attention_call<T>(a, args);
  const int64_t rows = all_rows(a), features = a.D > a.Dv ? a.D : a.Dv;
  float* const scratch = static_cast<float*>(context.workspace);
  const RowSums sums = {scratch, scratch + rows};
  launch(context, sum_rows<T>, tiles_of(rows, kRowThreads / kWarp), kRowThreads, 0, t, sums, rows);
  if constexpr (sizeof(T) == 4) {
    (features <= 128 ? start_all<SimtTiles<T, 128, 1, 2>, SimtTiles<T, 128, 2, 2>>
                     : start_all<SimtTiles<T, 256, 1, 2>, SimtTiles<T, 256, 2, 2>>)(t, sums, context);
  } else {
    (features <= 64    ? start_all<TensorTiles<T, 64, 64, 1, 2>, TensorTiles<T, 64, 64, 2, 2>>
     : features <= 128 ? start_all<TensorTiles<T, 128, 32, 1, 2>, TensorTiles<T, 128, 32, 2, 2>>
                       : start_all<TensorTiles<T, 256, 16, 1, 2>, TensorTiles<T, 256, 16, 2, 2>>)(t, sums, context);
  }
  if (!args.dbias) return;
  const int64_t tiles = tiles_of(a.Lq + a.Lkv - 1, SimtTile::kN);
  launch(context, along_distances<T>, a.B * a.Hq * tiles, SimtTile::kThreads, sizeof(Shared<BiasTiles<T>, Gradient::bias>), t,
         Divisor::by(tiles), sums);
}

// --- contract

const char* reject(const SdpaProblem& a) {
  const char* reason = attention_reject(a);
  if (reason || !a.bias.given) return reason;
  return a.B * a.Hq > kMostThreads / tiles_of(a.Lq + a.Lkv, SimtTile::kN) ? "there are more than 2^30 tiles of distances"
                                                                          : nullptr;
}

// Eight products where five would do if one pass summed all gradients; speeds as in the forward pass.
template <class T>
double cost(const SdpaProblem& a, const Machine&) {
  const double products = 2.0 * double(a.B * a.Hq) * double(a.Lq) * double(a.Lkv) * (5.0 * double(a.D) + 3.0 * double(a.Dv));
  return products / (sizeof(T) == 4 ? 12e12 : 190e12);
}

int64_t workspace(const SdpaProblem& a, const Machine&) { return 2 * all_rows(a) * int64_t(sizeof(float)); }

template <class T>
constexpr Kernel<SdpaProblem> kKernel = {1.0f, reject, cost<T>, workspace, run<T>};

}  // namespace

#ifdef FASTCONV_F32
extern constinit const Kernel<SdpaProblem> sdpa_bwd_flash_f32 = kKernel<float>;
#endif
#ifdef FASTCONV_F16
extern constinit const Kernel<SdpaProblem> sdpa_bwd_flash_f16 = kKernel<__half>;
#endif
#ifdef FASTCONV_BF16
extern constinit const Kernel<SdpaProblem> sdpa_bwd_flash_bf16 = kKernel<__nv_bfloat16>;
#endif

}  // namespace fastconv::sm80

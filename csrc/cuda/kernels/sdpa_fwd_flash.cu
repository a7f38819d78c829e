// sdpa_fwd.flash: attention with an online softmax. A block owns 64 queries, which meet one tile of keys after the other; of the
// scores there is never more than that tile, in registers.
//
//   tile       64 queries x 64 keys (32 where there are more than 128 features)
//   transform  keys and values into shared memory, one tile ahead of the products
//   multiply   scores, exp2, times values: blocks/attention_tensor.h for halves, blocks/attention_simt.h for float
//   run        a block for each tile of a unit's rows
//
// docs/kernels/cuda.md has the reasons. (Milakov, Gimelshein 2018; Dao et al. 2022.)
#include "cuda/blocks/attention_simt.h"
#include "cuda/blocks/attention_tensor.h"

namespace fastconv::sm80 {
namespace {

template <class Tiles>
struct Shared {
  typename Tiles::Shared tiles;
  Query queries[Tiles::kM];
  bool votes[Tiles::kThreads / kWarp];
};

// Over the lanes that share a row, in an order that is the same for all of them.
template <class Tiles, class Join>
FC_DEVICE float over_row(float x, const Join& join) {
  FC_UNROLL
  for (int bits = 1; bits < Tiles::kSharers; bits *= 2) x = join(x, __shfl_xor_sync(0xFFFFFFFFu, x, bits));
  return x;
}

// What is known of a thread's rows after some of the keys: out is the sum of exp2(score - top) * value, total that of the weights
// alone, of the thread's own columns.
template <class Tiles>
struct Softmax {
  typename Tiles::Sums out;
  float top[Tiles::kRows], total[Tiles::kRows];

  FC_DEVICE Softmax() {
    FC_UNROLL
    for (int r = 0; r < Tiles::kRows; ++r) top[r] = minus_infinity(), total[r] = 0;
  }

  // Products of the keys from n on become weights, and what was there before is brought to the new maximum.
  FC_DEVICE void weigh(const AttentionCall& t, const Query* queries, int n, bool whole, typename Tiles::Weights& weights) {
    FC_UNROLL
    for (int r = 0; r < Tiles::kRows; ++r) {
      const Query& q = queries[Tiles::row(r)];
      float most = minus_infinity(), slope;
      FC_UNROLL
      for (int c = 0; c < Tiles::kColumns; ++c) {
        const int j = n + Tiles::column(c);
        float& s = weights.at(r, c);
        s = whole || q.sees(j) ? score<typename Tiles::T>(t, q, j, s, slope) : minus_infinity();
        most = fmaxf(most, s);
      }
      const float peak = fmaxf(top[r], over_row<Tiles>(most, [](float a, float b) { return fmaxf(a, b); }));
      // Where nothing is visible yet: -inf - 0, and not -inf + inf.
      const float base = peak == minus_infinity() ? 0 : peak, shrink = exp2f(top[r] - base);
      top[r] = peak;
      float sum = 0;
      FC_UNROLL
      for (int c = 0; c < Tiles::kColumns; ++c) {
        float& s = weights.at(r, c);
        s = exp2f(s - base);
        sum += s;
        s *= kept(t, q, n + Tiles::column(c));
      }
      total[r] = total[r] * shrink + sum;
      FC_UNROLL
      for (int c = 0; c < Tiles::kFeatures; ++c) out.at(r, c) *= shrink;
    }
  }

  // Writes the outputs and log-sum-exps of the rows from `first` on. A sink joins the sum here.
  FC_DEVICE void finish(const AttentionCall& t, AttentionUnit u, int first) {
    using T = typename Tiles::T;
    const UnitRows<T> target = query_rows<T>(t, u, t.args.out, t.a.out, t.a.Dv, false);
    FC_UNROLL
    for (int r = 0; r < Tiles::kRows; ++r) {
      float sum = over_row<Tiles>(total[r], [](float a, float b) { return a + b; });
      const int row = first + Tiles::row(r);
      if (row >= t.rows) continue;
      const int64_t place = query_place(t, u, row);
      float shrink = 1, peak = top[r];
      const float sink = t.args.sink ? static_cast<const float*>(t.args.sink)[place / t.a.Lq] * kLog2e : minus_infinity();
      if (sink != minus_infinity()) {
        if (sum == 0 || sink > peak) shrink = sum == 0 ? 0 : exp2f(peak - sink), peak = sink;
        sum = sum * shrink + exp2f(sink - peak);
      }
      const float inverse = sum == 0 ? 0 : shrink / sum;
      T* to = target.at(row);
      FC_UNROLL
      for (int c = 0; c < Tiles::kFeatures; ++c) {
        const int d = Tiles::feature(c);
        if (d < target.features) to[d * target.feature] = from_float<T>(sum == 0 ? 0 : out.at(r, c) * inverse);
      }
      if (!t.args.lse || Tiles::column(0) != 0) continue;
      static_cast<float*>(t.args.lse)[place] = sum == 0 ? minus_infinity() : fmaf(peak, kLn2, logf(sum));
    }
  }
};

// --- run
template <class Tiles>
__global__ void __launch_bounds__(Tiles::kThreads) flash(AttentionCall t) {
  using T = typename Tiles::T;
  Shared<Tiles>& shared = shared_memory<Shared<Tiles>>();
  uint32_t tile = blockIdx.x;
  const AttentionUnit u = attention_unit(t, t.units.take(tile));
  // Under a causal mask the last queries see most keys: they begin first.
  const int first = int(tiles_of(t.rows, Tiles::kM) - 1 - tile) * Tiles::kM, keys = int(t.a.Lkv);
  const UnitRows<const T> fixed[] = {query_rows<const T>(t, u, t.args.q, t.a.q, t.a.D, t.packs_q)};
  const UnitRows<const T> moving[] = {key_rows<const T>(t, u, t.args.k, t.a.k, t.a.D, t.packs_k),
                                      key_rows<const T>(t, u, t.args.v, t.a.v, t.a.Dv, t.packs_v)};
  Tiles tiles(shared.tiles, fixed, first, moving);
  if (threadIdx.x < Tiles::kM) shared.queries[threadIdx.x] = query(t, u, first + int(threadIdx.x));
  const auto seen_from = [&](int n) {
    while (n < keys && !meet(t, first, Tiles::kM, n, Tiles::kN)) n += Tiles::kN;
    return n;
  };

  Softmax<Tiles> state;
  int n = seen_from(0), stage = 0;
  if (n < keys) tiles.start(n, stage);
  while (n < keys) {
    tiles.arrive();
    __syncthreads();  // this tile is there, and the one before it has been multiplied
    const int following = seen_from(n + Tiles::kN);
    if (following < keys) tiles.start(following, 1 - stage);
    typename Tiles::Weights weights;
    tiles.multiply(weights, 0, 0, n, stage);
    const bool whole = meet_wholly(t, first, Tiles::kM, n, Tiles::kN);
    state.weigh(t, shared.queries, n, whole, weights);
    // 0 * inf is NaN: where rows see different keys, a value that is not finite must not reach those that do not see it.
    if (!whole && any_of_block(shared.votes, tiles.found_infinite(1, n, stage))) {
      KeyRange seen[Tiles::kRows];
      FC_UNROLL
      for (int r = 0; r < Tiles::kRows; ++r) {
        const KeyRange all = shared.queries[Tiles::row(r)].keys;
        seen[r] = {all.begin - n, all.end - n};
      }
      tiles.accumulate_seen(state.out, weights, 1, n, stage, seen);
    } else {
      tiles.accumulate(state.out, weights, 1, n, stage);
    }
    n = following;
    stage = 1 - stage;
  }
  tiles.arrive();  // where no key is seen, the queries are still on their way
  state.finish(t, u, first);
}

template <class Tiles>
void start(const SdpaProblem& a, const SdpaArgs& args, const Context& context) {
  static_assert(sizeof(Shared<Tiles>) <= kSharedAtMost);
  const AttentionCall t = attention_call<typename Tiles::T>(a, args);
  launch(context, flash<Tiles>, a.B * a.Hkv * tiles_of(t.rows, Tiles::kM), Tiles::kThreads, sizeof(Shared<Tiles>), t);
}

// --- tile: 64 features are 42 KB of shared memory, 128 are 82, and 256 with 32 keys 98.
template <class T>
void run(const SdpaProblem& a, const SdpaArgs& args, const Context& context) {
  const int64_t features = a.D > a.Dv ? a.D : a.Dv;
  if constexpr (sizeof(T) == 4) {
    (features <= 128 ? start<SimtTiles<T, 128, 1, 2>> : start<SimtTiles<T, 256, 1, 2>>)(a, args, context);
  } else {
    (features <= 64    ? start<TensorTiles<T, 64, 64, 1, 2>>
     : features <= 128 ? start<TensorTiles<T, 128, 64, 1, 2>>
                       : start<TensorTiles<T, 256, 32, 1, 2>>)(a, args, context);
  }
}

// --- contract

// 60 % of an A100's 312 TFLOP/s with tensor cores, of 19.5 without: estimates.
template <class T>
double cost(const SdpaProblem& a, const Machine&) {
  const double products = 2.0 * double(a.B * a.Hq) * double(a.Lq) * double(a.Lkv) * double(a.D + a.Dv);
  return products / (sizeof(T) == 4 ? 12e12 : 190e12);
}

int64_t workspace(const SdpaProblem&, const Machine&) { return 0; }

template <class T>
constexpr Kernel<SdpaProblem> kKernel = {1.0f, attention_reject, cost<T>, workspace, run<T>};

}  // namespace

#ifdef FASTCONV_F32
extern constinit const Kernel<SdpaProblem> sdpa_fwd_flash_f32 = kKernel<float>;
#endif
#ifdef FASTCONV_F16
extern constinit const Kernel<SdpaProblem> sdpa_fwd_flash_f16 = kKernel<__half>;
#endif
#ifdef FASTCONV_BF16
extern constinit const Kernel<SdpaProblem> sdpa_fwd_flash_bf16 = kKernel<__nv_bfloat16>;
#endif

}  // namespace fastconv::sm80

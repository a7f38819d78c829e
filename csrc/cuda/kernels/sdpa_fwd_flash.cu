// sdpa_fwd.flash: attention with an online softmax. A block owns 64 queries, which meet one tile of keys after the other; of the
// scores there is never more than that tile, in registers.
//
//   tile       64 queries x 64 keys (32 where there are more than 128 features)
//   transform  keys and values into shared memory, one tile ahead of the products
//   multiply   scores, exp2, times values: blocks/attention_tensor.h for halves, blocks/attention_simt.h for float
//   run        a block for each tile of a unit's rows and segment of keys; where there are several segments, a warp joins a row's
//
// docs/kernels/cuda.md has the reasons. (Milakov, Gimelshein 2018; Dao et al. 2022.)
#include "cuda/blocks/attention_simt.h"
#include "cuda/blocks/attention_tensor.h"

namespace fastconv::sm80 {
namespace {

// Keys are cut into segments, of 1024 at least and as many as a warp has lanes at most, each summed from nothing by a block of
// its own, so that one query over many keys keeps many multiprocessors busy. The cuts depend on Lkv alone, whatever runs beside:
// a query has the same bits among others as alone. A segment's sums are 34 KB for 64 rows of 128 features, written and read once
// for 34 MFLOP.
constexpr int kLeastSegment = 1024, kMostSegments = kWarp, kRowsOfTile = 64;

struct Segments {
  int count, length;  // the length a multiple of every tile's keys

  static Segments of(const SdpaProblem& a) {
    const int64_t wanted = a.Lkv / kLeastSegment, most = wanted < 1 ? 1 : wanted < kMostSegments ? wanted : kMostSegments;
    const int64_t length = tiles_of(tiles_of(a.Lkv, int(most)), 64) * 64;
    return {length == 0 ? 1 : int(tiles_of(a.Lkv, int(length))), int(length)};
  }
};

// The sums of the segments of some tiles of rows, which are computed, and joined, some tiles at a time.
struct SegmentSums {
  Segments segments;
  Divisor by_segments;
  int64_t first_tile;  // among the tiles of all units, as blocks count them
  float* p;            // [tile][segment][64 * Dv + 2 * 64]: out, top, total of each row

  FC_INLINE static int64_t floats(int64_t features) { return kRowsOfTile * (features + 2); }
  FC_DEVICE float* at(int64_t tile, int64_t segment, int64_t features) const {
    return p + (tile * segments.count + segment) * floats(features);
  }
};

// Sums of one segment for all tiles of a launch: 1900 blocks of 128 features, nine for each that an A100 runs at a time.
constexpr int64_t kSumsAtMost = 64 << 20;

int64_t all_tiles(const SdpaProblem& a) { return a.B * a.Hkv * tiles_of(a.Hq / a.Hkv * a.Lq, kRowsOfTile); }

int64_t tiles_at_once(const SdpaProblem& a, const Segments& segments) {
  const int64_t most = kSumsAtMost / (segments.count * SegmentSums::floats(a.Dv) * int64_t(sizeof(float)));
  return most < 1 ? 1 : most < all_tiles(a) ? most : all_tiles(a);
}

// The tile with this number: its unit, and its first row. Under a causal mask the last queries see most keys: they begin first.
struct TileOfRows {
  AttentionUnit unit;
  int first;
};
FC_DEVICE TileOfRows tile_of_rows(const AttentionCall& t, uint32_t number) {
  const AttentionUnit unit = attention_unit(t, t.units.take(number));
  return {unit, int(tiles_of(t.rows, kRowsOfTile) - 1 - number) * kRowsOfTile};
}

// What a row's outputs are multiplied with, its sums being relative to exp2(peak); 0 where it sees nothing. A sink joins the sum
// here.
struct RowEnd {
  float inverse, lse;
};
FC_DEVICE RowEnd end_of_row(const AttentionCall& t, int64_t place, float peak, float sum) {
  float shrink = 1;
  const float sink = t.args.sink ? static_cast<const float*>(t.args.sink)[place / t.a.Lq] * kLog2e : minus_infinity();
  if (sink != minus_infinity()) {
    if (sum == 0 || sink > peak) shrink = sum == 0 ? 0 : exp2f(peak - sink), peak = sink;
    sum = sum * shrink + exp2f(sink - peak);
  }
  return {sum == 0 ? 0 : shrink / sum, sum == 0 ? minus_infinity() : fmaf(peak, kLn2, logf(sum))};
}

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

  // Writes the sums of the rows' segment: out where a row sees any of it, then top and total of each row.
  FC_DEVICE void keep(int features, float* to) {
    FC_UNROLL
    for (int r = 0; r < Tiles::kRows; ++r) {
      const float sum = over_row<Tiles>(total[r], [](float a, float b) { return a + b; });
      const int row = Tiles::row(r);
      FC_UNROLL
      for (int c = 0; c < Tiles::kFeatures; ++c) {
        if (sum != 0 && Tiles::feature(c) < features) to[row * features + Tiles::feature(c)] = out.at(r, c);
      }
      if (Tiles::column(0) != 0) continue;
      to[kRowsOfTile * features + row] = top[r];
      to[kRowsOfTile * (features + 1) + row] = sum;
    }
  }

  // Writes the outputs and log-sum-exps of the rows from `first` on.
  FC_DEVICE void finish(const AttentionCall& t, AttentionUnit u, int first) {
    using T = typename Tiles::T;
    const UnitRows<T> target = query_rows<T>(t, u, t.args.out, t.a.out, t.a.Dv, false);
    FC_UNROLL
    for (int r = 0; r < Tiles::kRows; ++r) {
      const float sum = over_row<Tiles>(total[r], [](float a, float b) { return a + b; });
      const int row = first + Tiles::row(r);
      if (row >= t.rows) continue;
      const int64_t place = query_place(t, u, row);
      const RowEnd end = end_of_row(t, place, top[r], sum);
      T* to = target.at(row);
      FC_UNROLL
      for (int c = 0; c < Tiles::kFeatures; ++c) {
        const int d = Tiles::feature(c);
        if (d < target.features) to[d * target.feature] = from_float<T>(sum == 0 ? 0 : out.at(r, c) * end.inverse);
      }
      if (t.args.lse && Tiles::column(0) == 0) static_cast<float*>(t.args.lse)[place] = end.lse;
    }
  }
};

// --- run
template <class Tiles>
__global__ void __launch_bounds__(Tiles::kThreads) flash(AttentionCall t, SegmentSums sums) {
  static_assert(Tiles::kM == kRowsOfTile);
  using T = typename Tiles::T;
  Shared<Tiles>& shared = shared_memory<Shared<Tiles>>();
  uint32_t tile = blockIdx.x;
  const uint32_t segment = sums.by_segments.take(tile);
  const TileOfRows rows = tile_of_rows(t, uint32_t(sums.first_tile) + tile);
  const AttentionUnit u = rows.unit;
  const int first = rows.first, begin = int(segment) * sums.segments.length;
  const int rest = int(t.a.Lkv) - begin, end = begin + (rest < sums.segments.length ? rest : sums.segments.length);
  const UnitRows<const T> fixed[] = {query_rows<const T>(t, u, t.args.q, t.a.q, t.a.D, t.packs_q)};
  const UnitRows<const T> moving[] = {key_rows<const T>(t, u, t.args.k, t.a.k, t.a.D, t.packs_k),
                                      key_rows<const T>(t, u, t.args.v, t.a.v, t.a.Dv, t.packs_v)};
  Tiles tiles(shared.tiles, fixed, first, moving);
  if (threadIdx.x < Tiles::kM) shared.queries[threadIdx.x] = query(t, u, first + int(threadIdx.x));
  const auto seen_from = [&](int n) {
    while (n < end && !meet(t, first, Tiles::kM, n, Tiles::kN)) n += Tiles::kN;
    return n;
  };

  Softmax<Tiles> state;
  int n = seen_from(begin), stage = 0;
  if (n < end) tiles.start(n, stage);
  while (n < end) {
    tiles.arrive();
    __syncthreads();  // this tile is there, and the one before it has been multiplied
    const int following = seen_from(n + Tiles::kN);
    if (following < end) tiles.start(following, 1 - stage);
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
  if (sums.segments.count == 1) {
    state.finish(t, u, first);
  } else {
    // By the block's number: with the tile and the segment alive through the loop, float spilled at 256 features.
    state.keep(int(t.a.Dv), sums.p + int64_t(blockIdx.x) * SegmentSums::floats(t.a.Dv));
  }
}

constexpr int kJoinThreads = 256;

// A warp for each row adds its segments up, in their order. Lane s knows segment s.
template <class T>
__global__ void __launch_bounds__(kJoinThreads, 1) join_segments(AttentionCall t, SegmentSums sums, uint32_t rows) {
  const uint32_t number = thread_number() / kWarp;
  if (number >= rows) return;
  const uint32_t tile = number / kRowsOfTile;
  const TileOfRows rows_of_tile = tile_of_rows(t, uint32_t(sums.first_tile) + tile);
  const AttentionUnit u = rows_of_tile.unit;
  const int first = rows_of_tile.first, lane = int(threadIdx.x) % kWarp, in_tile = int(number) % kRowsOfTile;
  const int row = first + in_tile;
  if (row >= t.rows) return;
  const int64_t features = t.a.Dv;
  const bool mine = lane < sums.segments.count;
  const float* const of_rows = sums.at(tile, mine ? lane : 0, features) + kRowsOfTile * features + in_tile;
  const float top = mine ? of_rows[0] : minus_infinity(), total = mine ? of_rows[kRowsOfTile] : 0;
  float peak = top;
  FC_UNROLL
  for (int bits = 1; bits < kWarp; bits *= 2) peak = fmaxf(peak, __shfl_xor_sync(0xFFFFFFFFu, peak, bits));
  // Where nothing is seen: -inf - 0, and not -inf + inf. Of such a segment `out` was not written.
  const unsigned seen = __ballot_sync(0xFFFFFFFFu, total != 0);
  const float weight = exp2f(top - (peak == minus_infinity() ? 0 : peak));
  float sum = 0;
  for (int s = 0; s < sums.segments.count; ++s) sum += __shfl_sync(0xFFFFFFFFu, weight * total, s);
  const int64_t place = query_place(t, u, row);
  const RowEnd end = end_of_row(t, place, peak, sum);
  const UnitRows<T> target = query_rows<T>(t, u, t.args.out, t.a.out, features, false);
  T* const to = target.at(row);
  for (int first_feature = 0; first_feature < features; first_feature += kWarp) {
    const int d = first_feature + lane;
    float out = 0;
    for (int s = 0; s < sums.segments.count; ++s) {
      const float w = __shfl_sync(0xFFFFFFFFu, weight, s);
      if (d < features && (seen >> s & 1)) out = fmaf(w, sums.at(tile, s, features)[in_tile * features + d], out);
    }
    if (d < features) to[d * target.feature] = from_float<T>(sum == 0 ? 0 : out * end.inverse);
  }
  if (t.args.lse && lane == 0) static_cast<float*>(t.args.lse)[place] = end.lse;
}

template <class Tiles>
void start(const SdpaProblem& a, const SdpaArgs& args, const Context& context) {
  static_assert(sizeof(Shared<Tiles>) <= kSharedAtMost);
  using T = typename Tiles::T;
  const AttentionCall t = attention_call<T>(a, args);
  const Segments segments = Segments::of(a);
  const int64_t tiles = all_tiles(a), at_once = segments.count == 1 ? tiles : tiles_at_once(a, segments);
  for (int64_t tile = 0; tile < tiles; tile += at_once) {
    const SegmentSums sums = {segments, Divisor::by(segments.count), tile, static_cast<float*>(context.workspace)};
    const int64_t count = tiles - tile < at_once ? tiles - tile : at_once;
    launch(context, flash<Tiles>, count * segments.count, Tiles::kThreads, sizeof(Shared<Tiles>), t, sums);
    if (segments.count == 1) continue;
    launch(context, join_segments<T>, tiles_of(count * kRowsOfTile, kJoinThreads / kWarp), kJoinThreads, 0, t, sums,
           uint32_t(count * kRowsOfTile));
  }
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

int64_t workspace(const SdpaProblem& a, const Machine&) {
  const Segments segments = Segments::of(a);
  if (segments.count == 1) return 0;
  return tiles_at_once(a, segments) * segments.count * SegmentSums::floats(a.Dv) * int64_t(sizeof(float));
}

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

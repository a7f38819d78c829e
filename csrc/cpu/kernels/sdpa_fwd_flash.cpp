// sdpa_fwd.flash: attention with an online softmax. A chunk of queries meets one block of keys after the other; of the scores
// there is never more than a tile of queries against a block.
//
//   tile       6 queries x 64 keys, then 6 queries x 64 features (AVX-512), blocks/gemm_tile.h
//   transform  keys into panels of 64, once for each head where they are at most 2 MB; values into rows, once for each chunk
//   where
//              they do not lie so; halves into floats
//   multiply   scores, exp2, times values
//              avx512_bf16: queries, keys, values and weights in bf16, multiplied in pairs
//   run        chunks of queries, or chunks x segments of keys, shared out among threads
//
// docs/kernels/attention.md has the arithmetic. (Milakov, Gimelshein 2018; Dao et al. 2022.)
#include "cpu/blocks/attention.h"
#include "cpu/blocks/dropout.h"
#include "cpu/blocks/online_softmax.h"
#include "cpu/blocks/parallel.h"
#if FC_HAS_PAIRS
#include "cpu/blocks/avx512_bf16/pair_tile.h"
#include "cpu/blocks/avx512_bf16/pair_values.h"
#endif

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- tile: queries of a chunk share packed keys and values, and their state stays in the L2. A chunk may take a third of it
// (910 queries at 64 features and 1 MB), beside a block of keys and values of 128 KB.
constexpr int64_t kMostRows = 768, kFewRows = 96;
// Scores of a row, and a vector of padding: rows 4 KB apart would look like one to the loads that overtake stores.
template <class T>
constexpr int64_t kLine = AttentionTile<T>::kKeys + kLanes<T>;

template <class T>
int64_t most_rows(const SdpaProblem& a, const Machine& machine) {
  const int64_t bytes = (a.D + round_up(a.Dv, kLanes<T>) + kLanes<T>)*int64_t(sizeof(T)), rows = machine.l2_bytes / 2 / bytes;
  return rows < kFewRows ? kFewRows : rows < kMostRows ? rows : kMostRows;
}

// Packing keys takes 4 % of the products of a chunk at 128 features: those of a whole head are kept for its other chunks, as long
// as they are no more than what streams from the L3 anyway.
template <class P>
FC_INLINE bool fits_keys(const SdpaProblem& a) {
  return a.Lkv * a.D * int64_t(sizeof(P)) <= 2 * 1024 * 1024;
}

// How a call is cut up. Nothing that is summed depends on it.
template <class T>
struct Schedule {
  int64_t units, rows, chunks, segments, width;
  bool split;  // segments are tasks of their own

  FC_INLINE Schedule(const SdpaProblem& a, const Machine& machine)
      : units(a.B * a.Hkv), rows(unit_rows(a)), segments(segment_count<T>(a)), width(round_up(a.Dv, kLanes<T>)) {
    // More chunks than memory asks for where threads would idle, as long as they stay large.
    const int64_t many = most_rows<T>(a, machine), threads = machine.threads;
    const int64_t fewest = (rows + many - 1) / many, most = (rows + kFewRows - 1) / kFewRows;
    const int64_t wanted = threads > 1 ? (2 * threads + units - 1) / units : 1;
    chunks = wanted < fewest ? fewest : wanted > most ? most : wanted;
    split = segments > 1 && units * chunks < threads;
  }
  FC_INLINE EvenSplit cut() const { return EvenSplit(rows, (rows + chunks - 1) / chunks); }
};

template <class S>
struct Scratch {
  using T = compute_t<S>;
  using P = pack_t<S>;
  // Weights of a row, and what rounding two vectors at once writes beyond.
  static constexpr int64_t kWeights = AttentionTile<T>::kKeys + 2 * kLanes<T>;

  P *q, *k, *v;
  T *s, *most;
  P *p, *hidden;              // weights, and what an edge hides of a pair of values, where there are pairs
  uint8_t *started, *packed;  // of each tile of queries, of each block of keys
  bool keeps;                 // packed keys

  FC_INLINE Scratch(Arena& arena, const SdpaProblem& a, int64_t rows, int64_t width) {
    using Tile = AttentionTile<T>;
    q = arena.take<P>(rows * round_up(a.D, kLanes<T>));
    keeps = rows < unit_rows(a) && fits_keys<P>(a);
    k = arena.take<P>((keeps ? round_up(a.Lkv, kLanes<T>) : block_keys<T>(a)) * panel_depth<S>(a.D));
    v = arena.take<P>(block_keys<T>(a) * width);
    p = arena.take<P>(kPairs<S> ? Tile::kRows * kWeights : 0);
    hidden = arena.take<P>(kPairs<S> ? 2 * width : 0);
    s = arena.take<T>(Tile::kRows * kLine<T>);
    most = arena.take<T>(Tile::kRows * kLanes<T>);
    started = arena.take<uint8_t>(rows);
    packed = arena.take<uint8_t>(a.Lkv / block_keys<T>(a) + 1);
  }
};

// --- multiply
// Keys whose values are summed in one chain; what chains sum is added up. At 2048 x 64 the error is 1.55 times torch's with the
// 1024 keys of a block in one, 1.20 with 512 and 0.99 with 256, which takes 1 % longer (128 features: 1.13 and 0.98, 1.7 %).
constexpr int64_t kChain = 256;

// The block of values that a tile is multiplied with: rows, or rows of pairs of keys.
template <class P>
struct Values {
  const P* v;
  int64_t step;
  bool exact;  // some value is NaN or infinite: a query must not even multiply by 0 what it does not see
};

template <class S, class T = compute_t<S>, class P = pack_t<S>>
FC_INLINE void tile(const SdpaProblem& a, const SdpaArgs& args, const ScoreTile<S>& at, const Values<P>& values, int64_t width,
                    const Scratch<S>& scratch, SoftmaxRows<T> state, bool started) {
  constexpr int64_t kL = kLanes<T>;
  const T factor = scores<S>(a, args, at);
  const int64_t rows = at.rows.count;
  const KeyRange vectors{at.keys.begin / kL * kL, round_up(at.keys.end, kL)};
  T shrink[AttentionTile<T>::kRowLanes], ones[AttentionTile<T>::kRowLanes];
  for (T& one : ones) one = 1;
  const Scores<T> weighed{rows, at.s, at.s_step, vectors, factor, at.most};
#if FC_HAS_PAIRS
  constexpr int64_t kWeights = Scratch<S>::kWeights;
  weigh(weighed, state, started, shrink, {scratch.p, kWeights, a.dropout.p > 0});
#else
  (void)scratch;
  weigh<T>(weighed, state, started, shrink);
#endif
  if (a.dropout.p > 0) {
    QueryRow row = query_row(a, at.rows.hkv, at.rows.first);
    for (int64_t m = 0; m < rows; ++m, advance(a, row)) {
      drop(a, dropout_row(a, at.rows.b, row.h, row.i), at.first_key + vectors.begin, vectors.end - vectors.begin,
           at.s + m * at.s_step + vectors.begin);
#if FC_HAS_PAIRS
      for (int64_t j = vectors.begin; j < vectors.end; j += kL) {
        store(scratch.p + m * kWeights + j, load(at.s + m * at.s_step + j));
      }
#endif
    }
  }
  const auto weighted = [&](int64_t m, int64_t count, KeyRange keys) {
    const T* factors = started ? shrink + m : nullptr;
#if FC_HAS_PAIRS
    keys = {keys.begin / 2 * 2, keys.empty() ? keys.begin / 2 * 2 : round_up(keys.end, 2)};
#endif
    for (int64_t begin = keys.begin, end; begin == keys.begin || begin < keys.end; begin = end, factors = ones) {
      end = (begin / kChain + 1) * kChain;
      end = end < keys.end ? end : keys.end;
#if FC_HAS_PAIRS
      multiply_pairs(count, width,
                     {scratch.p + m * kWeights + begin, kWeights, values.v + begin * width, width, (end - begin) / 2},
                     state.out + m * width, factors);
#else
      multiply_tile<T>(count, width,
                       {at.s + m * at.s_step + begin, at.s_step, 1, values.v + begin * values.step, values.step, end - begin,
                        state.out + m * width, width},
                       factors);
#endif
    }
  };
  if (!values.exact) return weighted(0, rows, at.keys);
  QueryRow row = query_row(a, at.rows.hkv, at.rows.first);
  for (int64_t m = 0; m < rows; ++m, advance(a, row)) {
    KeyRange keys = visible_keys(a, row.i);
    keys = meet({keys.begin - at.first_key, keys.end - at.first_key}, at.keys);
    if (keys.empty()) keys.end = keys.begin = at.keys.begin;
#if FC_HAS_PAIRS
    const auto half = [&](int64_t key, bool needed) { return needed ? scratch.v + key / 2 * 2 * width + key % 2 : nullptr; };
    const Hidden before(half(keys.begin - 1, !keys.empty() && keys.begin % 2), width, scratch.hidden);
    const Hidden behind(half(keys.end, !keys.empty() && keys.end % 2), width, scratch.hidden + width);
#endif
    weighted(m, 1, keys);
  }
}

// A chunk of queries against one segment of keys, from nothing.
template <class S, class T = compute_t<S>, class P = pack_t<S>>
void run_segment(const SdpaProblem& a, const SdpaArgs& args, const UnitRows& chunk, int64_t segment, const P* q,
                 const Scratch<S>& scratch, const SoftmaxRows<T>& state) {
  using Tile = AttentionTile<T>;
  const int64_t q_width = round_up(a.D, kLanes<T>), width = round_up(a.Dv, kLanes<T>), block = block_keys<T>(a),
                segment_size = segment_keys<T>(a);
  const Parts tiles(chunk.count, Tile::kRows);
  const KeyRange all = meet(visible_keys(a, chunk.first, chunk.count), {segment * segment_size, (segment + 1) * segment_size});
  for (int64_t t = 0; t < tiles.parts; ++t) scratch.started[t] = 0;
  // Rows that lie as packing would lay them need no copy, and neither do values that a few queries read once.
  const bool rows_of_vectors = a.v.d == 1 && a.Dv % kLanes<T> == 0;
  [[maybe_unused]] const bool in_place = !kIsHalf<S> && rows_of_vectors && (a.v.l == a.Dv || (tiles.parts == 1 && !is_banded(a)));

  for (int64_t first = all.begin / block * block; first < all.end; first += block) {
    const int64_t count = a.Lkv - first < block ? a.Lkv - first : block;
    const KeyRange seen = meet({all.begin - first, all.end - first}, {0, count});
    const Panels<T> all_panels(count);
    P* const panels = scratch.k + (scratch.keeps ? first * panel_depth<S>(a.D) : 0);
    const S* const v = at<S>(args.v, a.v, chunk.b, chunk.hkv, first);
    const LooseKeys<S> loose{at<S>(args.k, a.k, chunk.b, chunk.hkv, first), a.k, count, scratch.k};
    const bool once = tiles.parts == 1 && !scratch.keeps;
    if (!once && !(scratch.keeps && scratch.packed[first / block])) {
      pack_panels<S>(loose.source, a.k, count, a.D, scratch.keeps ? KeyRange{0, count} : seen, panels);
      scratch.packed[first / block] = 1;
    }
    Values<P> values{scratch.v, width, false};
#if FC_HAS_PAIRS
    // Whole pairs, of whose keys one may be hidden from all.
    const int64_t from = seen.begin / 2 * 2, end = round_up(seen.end, 2), to = end < count ? end : count;
    pack_pairs({v + from * a.v.l, a.v.d, a.v.l, to - from}, a.Dv, width, scratch.v + from * width);
    values.exact = is_banded(a) && !all_finite(scratch.v + from * width, (end - from) * width);
#else
    if constexpr (!kIsHalf<S>) {
      if (in_place) values = {v, a.v.l, false};
    }
    if (!in_place) {
      pack_rows<S>(v + seen.begin * a.v.l, a.v, seen.end - seen.begin, a.Dv, width, scratch.v + seen.begin * width);
    }
    values.exact = is_banded(a) && !all_finite(values.v + seen.begin * width, (seen.end - seen.begin) * width);
#endif
    for (int64_t t = 0; t < tiles.parts; ++t) {
      const int64_t row = tiles.begin(t), rows = tiles.size(t);
      KeyRange keys = visible_keys(a, chunk.first + row, rows);
      keys = meet({keys.begin - first, keys.end - first}, seen);
      if (keys.empty()) continue;
      SoftmaxRows<T> rest = state;
      rest.out += row * width, rest.sums += row * kLanes<T>, rest.most += row;
      if (kPairs<S>) rest.rounded += row * kLanes<T>;
      const ScoreTile<S> scores{{chunk.b, chunk.hkv, chunk.first + row, rows},
                                first,
                                all_panels,
                                keys,
                                q + row * q_width,
                                q_width,
                                panels,
                                scratch.s,
                                kLine<T>,
                                nullptr,
                                scratch.most,
                                once ? &loose : nullptr};
      tile<S>(a, args, scores, values, width, scratch, rest, scratch.started[t]);
      scratch.started[t] = 1;
    }
  }
  for (int64_t t = 0; t < tiles.parts; ++t) {
    if (scratch.started[t]) continue;
    for (int64_t r = tiles.begin(t); r < tiles.begin(t + 1); ++r) {
      state.most[r] = -kInfinity<T>;
      store(state.sums + r * kLanes<T>, zero<T>());
      if (kPairs<S>) store(state.rounded + r * kLanes<T>, zero<T>());
      for (int64_t c = 0; c < width; c += kLanes<T>) store(state.out + r * width + c, zero<T>());
    }
  }
}

template <class S, class T = compute_t<S>>
void finish(const SdpaProblem& a, const SdpaArgs& args, const UnitRows& chunk, const SoftmaxRows<T>& state, int64_t width) {
  QueryRow row = query_row(a, chunk.hkv, chunk.first);
  for (int64_t r = 0; r < chunk.count; ++r, advance(a, row)) {
    const T sink = args.sink ? static_cast<const T*>(args.sink)[chunk.b * a.Hq + row.h] : -kInfinity<T>;
    const auto total_of = [&](const T* sums) { return Total<T>(reduce_add(load(sums + r * kLanes<T>)), state.most[r], sink); };
    // What dropout leaves of a weight is rounded anew.
    const Total<T> total = total_of(kPairs<S> && a.dropout.p == 0 ? state.rounded : state.sums);
    S* out = at<S>(args.out, a.out, chunk.b, row.h, row.i);
    for (int64_t c = 0; c < a.Dv; c += kLanes<T>) {
      const int n = a.Dv - c < kLanes<T> ? int(a.Dv - c) : kLanes<T>;
      const vec<T> y = total.sum == 0 ? zero<T>() : load(state.out + r * width + c) * set1(total.shrink) / set1(total.sum);
      if (a.out.d == 1) {
        store(out + c, y, n);
      } else {
        store_strided(out + c * a.out.d, a.out.d, y, n);
      }
    }
    if (args.lse) static_cast<T*>(args.lse)[(chunk.b * a.Hq + row.h) * a.Lq + row.i] = total_of(state.sums).lse();
  }
}

// --- run
template <class T>
UnitRows chunk_at(const SdpaProblem& a, const Schedule<T>& schedule, int64_t task) {
  const EvenSplit rows = schedule.cut();
  const int64_t unit = task / rows.parts, place = task % rows.parts;
  // First, last, second, last but one: neighbours together cost the same under a causal mask.
  const int64_t part = place % 2 == 0 ? place / 2 : rows.parts - 1 - place / 2;
  return {unit / a.Hkv, unit % a.Hkv, rows.begin(part), rows.size(part)};
}

template <class S, class T = compute_t<S>>
struct Memory {
  int64_t scratch, state;  // bytes: of a thread, of a chunk in a segment

  FC_INLINE Memory(const SdpaProblem& a, const Schedule<T>& schedule) {
    const int64_t rows = schedule.cut().largest();
    Arena scratch_arena(nullptr), state_arena(nullptr);
    const Scratch<S> s(scratch_arena, a, rows, schedule.width);
    const SoftmaxRows<T> t(state_arena, rows, schedule.width, kPairs<S>);
    (void)s, (void)t;
    scratch = scratch_arena.used(), state = state_arena.used();
  }
};

template <class S, class T = compute_t<S>, class P = pack_t<S>>
void run(const SdpaProblem& a, const SdpaArgs& args, const Context& context) {
  const int threads = context.machine->threads;
  const Schedule<T> schedule(a, *context.machine);
  const Memory<S> memory(a, schedule);
  const int64_t tasks = schedule.units * schedule.cut().parts, largest = schedule.cut().largest();
  char* const scratches = static_cast<char*>(context.workspace);
  char* const states = scratches + threads * memory.scratch;
  const auto scratch_of = [&](int thread) {
    Arena arena(scratches + thread * memory.scratch);
    return Scratch<S>(arena, a, largest, schedule.width);
  };
  const auto state_at = [&](int64_t place) {
    Arena arena(states + place * memory.state);
    return SoftmaxRows<T>(arena, largest, schedule.width, kPairs<S>);
  };
  // Packed, or where they lie if that is the same.
  const int64_t q_width = round_up(a.D, kLanes<T>);
  const bool packed = !kIsHalf<S> && a.q.d == 1 && a.q.l == q_width && a.D == q_width && a.scale >= 0 &&
                      (a.Hq == a.Hkv || a.q.h == a.Lq * q_width);
  const auto queries = [&](const UnitRows& chunk, const Scratch<S>& scratch, bool first) -> const P* {
    if (first) __builtin_memset(scratch.packed, 0, size_t(a.Lkv / block_keys<T>(a) + 1));
    const QueryRow row = query_row(a, chunk.hkv, chunk.first);
    if constexpr (!kIsHalf<S>) {
      if (packed) return at<S>(args.q, a.q, chunk.b, row.h, row.i);
    }
    pack_queries<S>(a, chunk, args.q, q_width, scratch.q);
    return scratch.q;
  };

  if (!schedule.split) {
    parallel_ranges(context, tasks, [&](int thread, int64_t begin, int64_t end) {
      const Scratch<S> scratch = scratch_of(thread);
      const SoftmaxRows<T> total = state_at(2 * thread), next = state_at(2 * thread + 1);
      for (int64_t task = begin; task < end; ++task) {
        const UnitRows chunk = chunk_at(a, schedule, task);
        const P* const q = queries(chunk, scratch, task == begin || task % schedule.cut().parts == 0);
        run_segment<S>(a, args, chunk, 0, q, scratch, total);
        for (int64_t segment = 1; segment < schedule.segments; ++segment) {
          run_segment<S>(a, args, chunk, segment, q, scratch, next);
          add_segment(total, next, chunk.count, schedule.width);
        }
        finish<S>(a, args, chunk, total, schedule.width);
      }
    });
    return;
  }
  parallel_ranges(context, tasks * schedule.segments, [&](int thread, int64_t begin, int64_t end) {
    const Scratch<S> scratch = scratch_of(thread);
    for (int64_t place = begin; place < end; ++place) {
      const UnitRows chunk = chunk_at(a, schedule, place / schedule.segments);
      const P* const q = queries(chunk, scratch, true);
      run_segment<S>(a, args, chunk, place % schedule.segments, q, scratch, state_at(place));
    }
  });
  parallel_ranges(context, tasks, [&](int, int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const UnitRows chunk = chunk_at(a, schedule, task);
      const SoftmaxRows<T> total = state_at(task * schedule.segments);
      for (int64_t segment = 1; segment < schedule.segments; ++segment) {
        add_segment(total, state_at(task * schedule.segments + segment), chunk.count, schedule.width);
      }
      finish<S>(a, args, chunk, total, schedule.width);
    }
  });
}

// --- contract
const char* reject(const SdpaProblem& a) {
  if (a.B <= 0 || a.Lq <= 0 || a.Hq <= 0) return "there is no query";
  return nullptr;
}

template <class S>
double cost(const SdpaProblem& a, const Machine& machine) {
  const double products = 2.0 * double(a.B * a.Hq) * double(a.Lq) * double(a.Lkv) * double(a.D + a.Dv);
  return products / ((kPairs<S> ? 2 : 1) * 0.8 * 2.0 * 2.0 * kLanes<compute_t<S>> * 3e9 * machine.threads);
}

template <class S>
int64_t workspace(const SdpaProblem& a, const Machine& machine) {
  const Schedule<compute_t<S>> schedule(a, machine);
  const Memory<S> memory(a, schedule);
  const int64_t states = schedule.split ? schedule.units * schedule.cut().parts * schedule.segments : 2 * machine.threads;
  return machine.threads * memory.scratch + states * memory.state;
}

template <class S>
constexpr Kernel<SdpaProblem> kKernel = {1.0f, reject, cost<S>, workspace<S>, run<S>};

}  // namespace

extern constinit const Kernel<SdpaProblem> sdpa_fwd_flash_bf16 = kKernel<bf16>;
#if !FC_HAS_PAIRS
extern constinit const Kernel<SdpaProblem> sdpa_fwd_flash_f32 = kKernel<float>;
extern constinit const Kernel<SdpaProblem> sdpa_fwd_flash_f64 = kKernel<double>;
extern constinit const Kernel<SdpaProblem> sdpa_fwd_flash_f16 = kKernel<f16>;
#endif

}  // namespace fastconv::FASTCONV_TARGET

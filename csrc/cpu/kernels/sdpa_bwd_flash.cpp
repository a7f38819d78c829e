// sdpa_bwd.flash: the gradients of attention. The weights are computed again from lse, a chunk of queries against a block of keys
// at a time; the block's gradients of keys and values stay in the L2 while all queries pass.
//
//   tile       6 x 64 (AVX-512), blocks/gemm_tile.h, for all five products
//   transform  keys and values into panels, keys, queries and gradients into rows, halves into floats
//   multiply   s = q k', p = exp2(s), dp = dout v', ds = p (dp - delta), then dv += p' dout, dk += ds' q, dq += ds k
//   run        units, or segments of keys whose gradients of the queries are added up in order
//
// avx512_bf16: everything that is multiplied is bf16, two features, queries or keys at a time.
//
// docs/kernels/attention.md has the arithmetic. (Dao et al. 2022, algorithm 4, keys outside.)
#include "cpu/blocks/attention_gradient.h"
#include "cpu/blocks/dropout.h"
#include "cpu/blocks/parallel.h"
#if FC_HAS_PAIRS
#include "cpu/blocks/avx512_bf16/pair_tile.h"
#include "cpu/blocks/avx512_bf16/pair_values.h"
#endif

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- tile: 96 queries x 192 keys, which are whole tiles of 6 both ways. p and ds take 160 KB, the keys and values in all their
// forms 147 KB and their gradients 98 KB at 64 features, the last two twice that at 128: within an L2 of 1 MB (AVX-512, float).
template <class T>
struct Block {
  static constexpr int64_t kRows = 96;
  static constexpr int64_t kKeys = 192 / AttentionTile<T>::kPanel * AttentionTile<T>::kPanel;
  // dk and dv read a column of p: 768 bytes from row to row would put all of it into a quarter of the L1.
  static constexpr int64_t kLine = kKeys + kLanes<T>;
};

constexpr double kLog2e = 1.4426950408889634074;

template <class T>
constexpr T kInfinity = T(__builtin_inf());

// Keys of a segment: of its own dq, so at least 2 blocks, and at most 16 segments, which bounds what they take.
template <class T>
FC_INLINE int64_t segment_of(const SdpaProblem& a) {
  const int64_t keys = Block<T>::kKeys, even = (a.Lkv + 16 * keys - 1) / (16 * keys);
  return keys * (even > 2 ? even : 2);
}

// How a call is cut up. Nothing that is summed depends on the threads.
template <class T>
struct Schedule {
  int64_t units, rows, segments, width, value_width;
  int64_t distances;  // of the relative bias, for the heads of a unit; its gradient lies behind the unit's dq
  bool split;         // segments are tasks of their own

  FC_INLINE Schedule(const SdpaProblem& a, int64_t threads)
      : units(a.B * a.Hkv),
        rows(unit_rows(a)),
        segments((a.Lkv + segment_of<T>(a) - 1) / segment_of<T>(a)),
        width(round_up(a.D, kLanes<T>)),
        value_width(round_up(a.Dv, kLanes<T>)),
        distances(a.bias.given ? round_up(a.Hq / a.Hkv * (a.Lq + a.Lkv - 1), kLanes<T>) : 0) {
    split = segments > 1 && units < threads;
  }
  // Numbers of a unit's dq and of what lies behind it.
  FC_INLINE int64_t elements() const { return rows * width + distances; }
};

template <class S>
struct Scratch {
  using T = compute_t<S>;
  using P = pack_t<S>;
  P *q, *dout, *k_panels, *v_panels, *k;
  T *p, *ds, *slope, *dk, *dv, *kept;
  // Where there are pairs, what is multiplied: of two queries, of two keys, and what an edge hides of one.
  P *p_two, *ds_two, *q_two, *dout_two, *ds_rows, *hidden;

  FC_INLINE Scratch(Arena& arena, const SdpaProblem& a, const Schedule<T>& schedule) {
    using B = Block<T>;
    q = arena.take<P>(B::kRows * schedule.width);
    dout = arena.take<P>(B::kRows * schedule.value_width);
    k_panels = arena.take<P>(B::kKeys * panel_depth<S>(a.D));
    v_panels = arena.take<P>(B::kKeys * panel_depth<S>(a.Dv));
    k = arena.take<P>(B::kKeys * schedule.width);
    p = arena.take<T>(B::kRows * B::kLine);
    ds = arena.take<T>(B::kRows * B::kLine);
    slope = arena.take<T>(AttentionTile<T>::kRows * B::kLine);
    dk = arena.take<T>(B::kKeys * schedule.width);
    dv = arena.take<T>(B::kKeys * schedule.value_width);
    kept = arena.take<T>(B::kKeys);
    if (!kPairs<S>) return;
    p_two = arena.take<P>(B::kRows * B::kLine);
    ds_two = arena.take<P>(B::kRows * B::kLine);
    q_two = arena.take<P>(B::kRows * schedule.width);
    dout_two = arena.take<P>(B::kRows * schedule.value_width);
    ds_rows = arena.take<P>(B::kRows * B::kLine);
    hidden = arena.take<P>(schedule.width);
  }
};

// What a row has besides its scores: its lse in units of log 2, and sum(dout * out) - dlse.
template <class T>
struct RowSums {
  T *lse, *delta;  // [B*Hq*Lq]
};

FC_INLINE void clear(void* p, int64_t bytes) { __builtin_memset(p, 0, size_t(bytes)); }

template <class S, class T = compute_t<S>>
void sum_row(const SdpaProblem& a, const SdpaArgs& args, const RowSums<T>& sums, int64_t place) {
  const int64_t i = place % a.Lq, h = place / a.Lq % a.Hq, b = place / a.Lq / a.Hq;
  const S *dout = at<S>(args.dout, a.dout, b, h, i), *out = at<S>(args.out, a.out, b, h, i);
  vec<T> sum = zero<T>();
  for (int64_t d = 0; d < a.Dv; d += kLanes<T>) {
    const int n = a.Dv - d < kLanes<T> ? int(a.Dv - d) : kLanes<T>;
    const bool dense = a.dout.d == 1 && a.out.d == 1;
    const vec<T> x = dense ? load(dout + d, n) : load_strided(dout + d * a.dout.d, a.dout.d, n);
    const vec<T> y = dense ? load(out + d, n) : load_strided(out + d * a.out.d, a.out.d, n);
    sum = fma(x, y, sum);
  }
  const T lse = static_cast<const T*>(args.lse)[place];
  sums.delta[place] = reduce_add(sum) - (args.dlse ? static_cast<const T*>(args.dlse)[place] : T(0));
  // A query that sees nothing: every weight is exp2(-inf - inf).
  sums.lse[place] = lse == -kInfinity<T> ? kInfinity<T> : T(double(lse) * kLog2e);
}

// --- multiply
template <class T>
void clear_columns(T* rows, int64_t count, int64_t step, int64_t begin, int64_t end) {
  if (end <= begin) return;
  for (int64_t m = 0; m < count; ++m) clear(rows + m * step + begin, (end - begin) * int64_t(sizeof(T)));
}

// What the rows of a chunk have in common with a block of keys.
template <class T>
struct Meeting {
  UnitRows rows;
  int64_t first_key, keys;  // of the block
  KeyRange seen;            // by some row, counted from first_key
};

// p and ds of up to kRows rows: [row][kLine].
template <class S, class T = compute_t<S>>
void weights(const SdpaProblem& a, const SdpaArgs& args, const Meeting<T>& at, const Scratch<S>& scratch, const RowSums<T>& sums,
             const Schedule<T>& schedule, T* dbias) {
  using B = Block<T>;
  constexpr int64_t kL = kLanes<T>;
  const Parts tiles(at.rows.count, AttentionTile<T>::kRows);
  const Panels<T> panels(at.keys);
  const KeyRange used{at.seen.begin / kL * kL, round_up(at.seen.end, kL)};
  for (int64_t t = 0; t < tiles.parts; ++t) {
    const int64_t row = tiles.begin(t), rows = tiles.size(t);
    T *const p = scratch.p + row * B::kLine, *const ds = scratch.ds + row * B::kLine;
    KeyRange keys = visible_keys(a, at.rows.first + row, rows);
    keys = meet({keys.begin - at.first_key, keys.end - at.first_key}, at.seen);
    if (keys.empty()) keys = {used.begin, used.begin};
    const KeyRange vectors{keys.begin / kL * kL, round_up(keys.end, kL)};
    // Vectors that no row of this tile sees, but others of the block do.
    const auto clear_rest = [&] {
      clear_columns(p, rows, B::kLine, used.begin, vectors.begin);
      clear_columns(p, rows, B::kLine, vectors.end, used.end);
      clear_columns(ds, rows, B::kLine, used.begin, vectors.begin);
      clear_columns(ds, rows, B::kLine, vectors.end, used.end);
    };
    if (keys.empty()) {
      clear_rest();
      continue;
    }
    const UnitRows some{at.rows.b, at.rows.hkv, at.rows.first + row, rows};
    T* const slope = a.softcap != 0 ? scratch.slope : nullptr;
    const T factor = scores<S>(a, args,
                               {some, at.first_key, panels, keys, scratch.q + row * schedule.width, schedule.width,
                                scratch.k_panels, p, B::kLine, slope});
    dot_products<S>({some, at.first_key, panels, keys, scratch.dout + row * schedule.value_width, schedule.value_width,
                     scratch.v_panels, ds, B::kLine, nullptr},
                    a.Dv);
    clear_rest();
    QueryRow query = query_row(a, some.hkv, some.first);
    for (int64_t m = 0; m < rows; ++m, advance(a, query)) {
      const int64_t place = (some.b * a.Hq + query.h) * a.Lq + query.i;
      T* kept = nullptr;
      if (a.dropout.p > 0) {
        kept = scratch.kept;
        for (int64_t j = vectors.begin; j < vectors.end; j += kL) store(kept + j, set1(T(1)));
        drop(a, dropout_row(a, some.b, query.h, query.i), at.first_key + vectors.begin, vectors.end - vectors.begin,
             kept + vectors.begin);
      }
      T* const row_ds = ds + m * B::kLine;
      differentiate(p + m * B::kLine, row_ds, kept, vectors, factor, sums.lse[place], sums.delta[place]);
      if (args.dmask) {
        T* dmask = static_cast<T*>(args.dmask) + place * a.Lkv + at.first_key;
        for (int64_t j = keys.begin; j < keys.end; ++j) dmask[j] = row_ds[j];
      }
      if (dbias) {
        T* line = dbias + query.h % (a.Hq / a.Hkv) * (a.Lq + a.Lkv - 1) + at.first_key - query.i + a.Lq - 1;
        for (int64_t j = keys.begin; j < keys.end; ++j) line[j] += row_ds[j];
      }
      if (!slope) continue;
      for (int64_t j = vectors.begin; j < vectors.end; j += kL) {
        store(row_ds + j, load(row_ds + j) * load(slope + m * B::kLine + j));
      }
    }
  }
}

#if FC_HAS_PAIRS
// dv, dk and dq of a chunk and a block.
template <class T>
void add_gradients(const Meeting<T>& at, const Schedule<T>& schedule, const Scratch<bf16>& scratch, float* dq) {
  constexpr int64_t kL = kLanes<float>, kLine = Block<float>::kLine;
  const int64_t width = schedule.width, value_width = schedule.value_width, rows = at.rows.count, two = (rows + 1) / 2;
  const int64_t begin = at.seen.begin / kL * kL, count = at.seen.end - begin;
  round_weights(
      {rows, {begin, round_up(at.seen.end, kL)}, kLine, scratch.p, scratch.ds, scratch.p_two, scratch.ds_two, scratch.ds_rows});
  add_products(count, value_width, {scratch.p_two + 2 * begin, 2, scratch.dout_two, value_width, two, 2 * kLine},
               scratch.dv + begin * value_width);
  add_products(count, width, {scratch.ds_two + 2 * begin, 2, scratch.q_two, width, two, 2 * kLine}, scratch.dk + begin * width);
  // The key behind an odd number of them is hidden, and may hold anything.
  const bool odd = count % 2 != 0;
  for (int64_t m = 0; odd && m < rows; ++m) scratch.ds_rows[m * kLine + at.seen.end] = bf16{0};
  const Hidden behind(odd ? scratch.k + (at.seen.end - 1) * width + 1 : nullptr, width, scratch.hidden);
  add_products(rows, width, {scratch.ds_rows + begin, kLine, scratch.k + begin * width, width, (count + 1) / 2}, dq);
}
#endif

// A segment of keys of one unit: their dk and dv, and their share of the unit's dq, [rows][width] times scale, from nothing.
template <class S, class T = compute_t<S>>
void run_segment(const SdpaProblem& a, const SdpaArgs& args, int64_t unit, int64_t segment, const Schedule<T>& schedule,
                 const Scratch<S>& scratch, const RowSums<T>& sums, T* dq) {
  using B = Block<T>;
  [[maybe_unused]] constexpr int64_t kL = kLanes<T>;
  const int64_t b = unit / a.Hkv, hkv = unit % a.Hkv, width = schedule.width, value_width = schedule.value_width;
  const int64_t end = a.Lkv < (segment + 1) * segment_of<T>(a) ? a.Lkv : (segment + 1) * segment_of<T>(a);
  clear(dq, schedule.elements() * int64_t(sizeof(T)));
  for (int64_t first = segment * segment_of<T>(a); first < end; first += B::kKeys) {
    const int64_t keys = end - first < B::kKeys ? end - first : B::kKeys;
    const S *k = at<S>(args.k, a.k, b, hkv, first), *v = at<S>(args.v, a.v, b, hkv, first);
    pack_panels<S>(k, a.k, keys, a.D, {0, keys}, scratch.k_panels);
    pack_panels<S>(v, a.v, keys, a.Dv, {0, keys}, scratch.v_panels);
#if FC_HAS_PAIRS
    pack_pairs({k, a.k.d, a.k.l, keys}, a.D, width, scratch.k);
#else
    pack_rows<S>(k, a.k, keys, a.D, width, scratch.k);
#endif
    clear(scratch.dk, keys * width * int64_t(sizeof(T)));
    clear(scratch.dv, keys * value_width * int64_t(sizeof(T)));
    for (int64_t row = 0; row < schedule.rows; row += B::kRows) {
      const int64_t rows = schedule.rows - row < B::kRows ? schedule.rows - row : B::kRows;
      KeyRange seen = visible_keys(a, row, rows);
      seen = meet({seen.begin - first, seen.end - first}, {0, keys});
      if (seen.empty()) continue;
      const Meeting<T> meeting{{b, hkv, row, rows}, first, keys, seen};
      pack_queries<S>(a, meeting.rows, args.q, width, scratch.q);
      pack_unit_rows<S>(a, meeting.rows, static_cast<const S*>(args.dout), a.dout, a.Dv, value_width, scratch.dout);
      weights<S>(a, args, meeting, scratch, sums, schedule, args.dbias ? dq + schedule.rows * width : nullptr);
#if FC_HAS_PAIRS
      pair_up(scratch.q, rows, width, scratch.q_two);
      pair_up(scratch.dout, rows, value_width, scratch.dout_two);
      add_gradients(meeting, schedule, scratch, dq + row * width);
#else
      const int64_t begin = seen.begin / kL * kL, count = seen.end - begin;
      multiply<T>(
          count, value_width,
          {scratch.p + begin, 1, B::kLine, scratch.dout, value_width, rows, scratch.dv + begin * value_width, value_width}, true);
      multiply<T>(count, width, {scratch.ds + begin, 1, B::kLine, scratch.q, width, rows, scratch.dk + begin * width, width},
                  true);
      multiply<T>(rows, width,
                  {scratch.ds + begin, B::kLine, 1, scratch.k + begin * width, width, count, dq + row * width, width}, true);
#endif
    }
    // The packed queries carry the sign of the scale.
    write_rows(at<S>(args.dk, a.dk, b, hkv, first), a.dk.l, a.dk.d, scratch.dk, keys, a.D, width,
               T(a.scale < 0 ? -a.scale : a.scale));
    write_rows(at<S>(args.dv, a.dv, b, hkv, first), a.dv.l, a.dv.d, scratch.dv, keys, a.Dv, value_width, T(1));
  }
}

template <class S, class T = compute_t<S>>
void write_dq(const SdpaProblem& a, const SdpaArgs& args, int64_t unit, const T* dq, int64_t width) {
  const int64_t group = a.Hq / a.Hkv, b = unit / a.Hkv, hkv = unit % a.Hkv;
  for (int64_t g = 0; g < group; ++g) {
    write_rows(at<S>(args.dq, a.dq, b, hkv * group + g, 0), a.dq.l, a.dq.d, dq + g * a.Lq * width, a.Lq, a.D, width, T(a.scale));
  }
}

template <class T>
void add(T* total, const T* more, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<T>) store(total + i, load(total + i) + load(more + i));
}

// --- run
template <class S, class T = compute_t<S>>
struct Memory {
  int64_t sums, scratch, dq, buffers;  // bytes of each, and how many buffers of dq

  FC_INLINE Memory(const SdpaProblem& a, const Schedule<T>& schedule, int64_t threads) {
    Arena arena(nullptr);
    const Scratch<S> s(arena, a, schedule);
    (void)s;
    sums = round_up(a.B * a.Hq * a.Lq * int64_t(sizeof(T)), 64);
    scratch = arena.used();
    dq = round_up(schedule.elements() * int64_t(sizeof(T)), 64);
    buffers = schedule.split ? schedule.units * schedule.segments : 2 * threads;
  }
};

template <class S, class T = compute_t<S>>
void run(const SdpaProblem& a, const SdpaArgs& args, const Context& context) {
  const int64_t threads = context.machine->threads;
  const Schedule<T> schedule(a, threads);
  const Memory<S> memory(a, schedule, threads);
  char* const base = static_cast<char*>(context.workspace);
  const RowSums<T> sums{reinterpret_cast<T*>(base), reinterpret_cast<T*>(base + memory.sums)};
  char* const scratches = base + 2 * memory.sums;
  const auto scratch_of = [&](int thread) {
    Arena arena(scratches + thread * memory.scratch);
    return Scratch<S>(arena, a, schedule);
  };
  const auto dq_at = [&](int64_t place) {
    return reinterpret_cast<T*>(scratches + threads * memory.scratch + place * memory.dq);
  };
  const int64_t places = a.B * a.Hq * a.Lq;

  parallel_ranges(context, places, [&](int, int64_t begin, int64_t end) {
    for (int64_t place = begin; place < end; ++place) sum_row<S>(a, args, sums, place);
    if (!args.dmask || end <= begin) return;
    clear(static_cast<T*>(args.dmask) + begin * a.Lkv, (end - begin) * a.Lkv * int64_t(sizeof(T)));
  });
  const auto add_up = [&](int64_t unit, T* total, const auto& next) {
    for (int64_t segment = 1; segment < schedule.segments; ++segment) add(total, next(segment), schedule.elements());
    write_dq<S>(a, args, unit, total, schedule.width);
    if (!args.dbias) return;
    const int64_t count = a.Hq / a.Hkv * (a.Lq + a.Lkv - 1);
    __builtin_memcpy(static_cast<T*>(args.dbias) + unit * count, total + schedule.rows * schedule.width,
                     size_t(count) * sizeof(T));
  };
  if (!schedule.split) {
    parallel_ranges(context, schedule.units, [&](int thread, int64_t begin, int64_t end) {
      const Scratch<S> scratch = scratch_of(thread);
      T *const total = dq_at(2 * thread), *const more = dq_at(2 * thread + 1);
      for (int64_t unit = begin; unit < end; ++unit) {
        clear(total, schedule.segments > 0 ? 0 : memory.dq);
        if (schedule.segments > 0) run_segment<S>(a, args, unit, 0, schedule, scratch, sums, total);
        add_up(unit, total, [&](int64_t segment) {
          run_segment<S>(a, args, unit, segment, schedule, scratch, sums, more);
          return more;
        });
      }
    });
    return;
  }
  parallel_ranges(context, schedule.units * schedule.segments, [&](int thread, int64_t begin, int64_t end) {
    const Scratch<S> scratch = scratch_of(thread);
    for (int64_t place = begin; place < end; ++place) {
      run_segment<S>(a, args, place / schedule.segments, place % schedule.segments, schedule, scratch, sums, dq_at(place));
    }
  });
  parallel_ranges(context, schedule.units, [&](int, int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      add_up(unit, dq_at(unit * schedule.segments), [&](int64_t segment) { return dq_at(unit * schedule.segments + segment); });
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
  const double products = 2.0 * double(a.B * a.Hq) * double(a.Lq) * double(a.Lkv) * (3.0 * double(a.D) + 2.0 * double(a.Dv));
  return products / ((kPairs<S> ? 2 : 1) * 0.7 * 2.0 * 2.0 * kLanes<compute_t<S>> * 3e9 * machine.threads);
}

template <class S>
int64_t workspace(const SdpaProblem& a, const Machine& machine) {
  const Schedule<compute_t<S>> schedule(a, machine.threads);
  const Memory<S> memory(a, schedule, machine.threads);
  return 2 * memory.sums + machine.threads * memory.scratch + memory.buffers * memory.dq;
}

template <class S>
constexpr Kernel<SdpaProblem> kKernel = {1.0f, reject, cost<S>, workspace<S>, run<S>};

}  // namespace

extern constinit const Kernel<SdpaProblem> sdpa_bwd_flash_bf16 = kKernel<bf16>;
#if !FC_HAS_PAIRS
extern constinit const Kernel<SdpaProblem> sdpa_bwd_flash_f32 = kKernel<float>;
extern constinit const Kernel<SdpaProblem> sdpa_bwd_flash_f64 = kKernel<double>;
extern constinit const Kernel<SdpaProblem> sdpa_bwd_flash_f16 = kKernel<f16>;
#endif

}  // namespace fastconv::FASTCONV_TARGET

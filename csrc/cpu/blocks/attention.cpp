#include "cpu/blocks/attention.h"

#include "cpu/blocks/activation.h"
#include "cpu/blocks/attention_tile.h"
#include "cpu/blocks/columns.h"
#include "cpu/blocks/filter_panel.h"
#if FC_HAS_PAIRS
#include "cpu/blocks/avx512_bf16/pair_columns.h"
#include "cpu/blocks/avx512_bf16/pair_strip.h"
#include "cpu/blocks/avx512_bf16/pair_tile.h"
#endif

namespace fastconv::FASTCONV_TARGET {
namespace {

constexpr double kLog2e = 1.4426950408889634074;

template <class T>
constexpr T kInfinity = T(__builtin_inf());
// Only -inf is less.
template <class T>
constexpr T kLowest = sizeof(T) == 4 ? T(-__FLT_MAX__) : T(-__DBL_MAX__);

template <class T>
FC_INLINE void fill_from(T* p, int64_t begin, int64_t end, T value) {
  for (int64_t j = begin; j < end; j += kLanes<T>) store(p + j, set1(value), int(end - j < kLanes<T> ? end - j : kLanes<T>));
}

// row[j] = numbers[j * step] in units of log 2, or that added to it.
template <class S>
FC_INLINE void bias_row(const void* numbers, int64_t offset, int64_t step, int64_t begin, int64_t end, compute_t<S>* row,
                        bool more = false) {
  using T = compute_t<S>;
  const S* p = static_cast<const S*>(numbers) + offset;
  for (int64_t j = begin; j < end; j += kLanes<T>) {
    const int n = end - j < kLanes<T> ? int(end - j) : kLanes<T>;
    const vec<T> x = (step == 1 ? load(p + j, n) : load_strided(p + j * step, step, n)) * set1(T(kLog2e));
    store(row + j, more ? load(row + j, n) + x : x, n);
  }
}

// One row of the mask as numbers to add, in units of log 2: -inf for what a boolean mask hides.
template <class S>
FC_INLINE void mask_row(const SdpaProblem& a, const void* mask, int64_t offset, int64_t begin, int64_t end, compute_t<S>* row) {
  using T = compute_t<S>;
  const int64_t step = a.mask.d;
  if (a.mask_kind == MaskKind::additive) return bias_row<S>(mask, offset, step, begin, end, row);
  if (a.mask_kind == MaskKind::wide) return bias_row<T>(mask, offset, step, begin, end, row);
  const uint8_t* p = static_cast<const uint8_t*>(mask) + offset;
  if (step == 1) {
    for (int64_t j = begin; j < end; ++j) row[j] = p[j] ? T(0) : -kInfinity<T>;
  } else {
    for (int64_t j = begin; j < end; ++j) row[j] = p[j * step] ? T(0) : -kInfinity<T>;
  }
}

// Scores with a mask or a cap, in units of log 2, in place.
template <class S>
__attribute__((noinline)) void alter(const SdpaProblem& a, const SdpaArgs& args, const ScoreTile<S>& tile, KeyRange vectors) {
  using T = compute_t<S>;
  using Tile = AttentionTile<T>;
  T row[Tile::kKeys];
  const T scale = T(a.scale < 0 ? -a.scale : a.scale), cap = T(a.softcap), inverse = cap != 0 ? 1 / cap : T(0);
  const bool hides = a.mask_kind == MaskKind::boolean, adds = a.mask_kind != MaskKind::none;
  fill_from(row, vectors.begin, vectors.end, T(0));
  QueryRow at = query_row(a, tile.rows.hkv, tile.rows.first);
  for (int64_t m = 0; m < tile.rows.count; ++m, advance(a, at)) {
    const bool again = m > 0 && a.mask.h == 0 && a.mask.l == 0 && !a.bias.given;
    if (adds && !again) {
      mask_row<S>(a, args.mask, tile.rows.b * a.mask.b + at.h * a.mask.h + at.i * a.mask.l + tile.first_key * a.mask.d,
                  tile.keys.begin, tile.keys.end, row);
    }
    if (a.bias.given) {
      const int64_t distance = tile.first_key - at.i + a.Lq - 1;
      bias_row<T>(args.bias, tile.rows.b * a.bias.b + at.h * a.bias.h + distance * a.bias.distance, a.bias.distance,
                  tile.keys.begin, tile.keys.end, row, adds);
    }
    T* s = tile.s + m * tile.s_step;
    for (int64_t j = vectors.begin; j < vectors.end; j += kLanes<T>) {
      vec<T> x = load(s + j) * set1(scale);
      if (cap != 0) {
        const vec<T> t = tanh(x * set1(inverse));
        if (tile.slope) store(tile.slope + m * tile.s_step + j, fma(t, zero<T>() - t, set1(T(1))));
        x = set1(cap) * t;
      }
      const vec<T> shift = load(row + j);
      x = fma(x, set1(T(kLog2e)), shift);
      // A hidden key may hold anything: NaN - inf would let it through.
      if (hides) x = blend(greater(set1(kLowest<T>), shift), shift, x);
      store(s + j, x);
    }
  }
}

template <class T>
FC_INLINE KeyRange whole_vectors(KeyRange keys) {
  return {keys.begin / kLanes<T> * kLanes<T>, round_up(keys.end, kLanes<T>)};
}

// Which keys of the block all rows of a tile see.
template <class S>
FC_INLINE KeyRange seen_by_all(const SdpaProblem& a, const ScoreTile<S>& tile) {
  KeyRange all{0, a.Lkv - tile.first_key};
  if (!is_banded(a)) return all;
  QueryRow at = query_row(a, tile.rows.hkv, tile.rows.first);
  for (int64_t m = 0; m < tile.rows.count; ++m, advance(a, at)) {
    const KeyRange keys = visible_keys(a, at.i);
    all = meet(all, {keys.begin - tile.first_key, keys.end - tile.first_key});
  }
  return all;
}

// One panel of keys, as it lies in memory. `count` keys are there.
template <class S>
FC_INLINE void pack_panel(const S* source, const SdpaStride& stride, int64_t count, int64_t features, int64_t width,
                          pack_t<S>* panel) {
#if FC_HAS_PAIRS
  pack_pairs({source, stride.l, stride.d, features}, count, width, panel);
#else
  const int64_t offset = 0;
  pack_filters<S>({source, stride.l, stride.d, &offset, 1, features}, count, width, panel);
#endif
}

// A score of many features is a sum of chains of 128, added in order: as one chain, 512 are off by 1.9 times what torch's are,
// whose GEMM cuts them too, and 256 by 1.5. Up to 192 it is one chain, which is off by no more than theirs and 5 % faster, and
// one of length 0 without any. Products of pairs are not cut: a bf16's own rounding is larger.
template <class S>
FC_INLINE Parts chains_of(int64_t features) {
  Parts chains(features, kPairs<S> || features <= 192 ? features + 1 : 128);
  chains.parts += chains.parts == 0;
  return chains;
}

// One query against one panel of keys that nobody else reads: transposed in registers, 16 x 16 at a time.
template <class S, class T = compute_t<S>>
__attribute__((noinline)) void loose_products(const pack_t<S>* q, const LooseKeys<S>& loose, int64_t first, int64_t features,
                                              int64_t width, T* s) {
  constexpr int kL = kLanes<T>;
  const int64_t step = loose.stride.l, count = loose.count - first;
  const S* const keys = loose.source + first * step;
  constexpr int64_t kTogether = kPairs<S> ? 2 * kL : kL;
  T later[AttentionTile<T>::kPanel];          // a chain behind the first
  const ReadAhead ahead{0, 0, width * step};  // the same of the next panel: a line of each key
  const Parts chains = chains_of<S>(features);
  const auto chain = [&](int64_t begin, int64_t end, T* sums) {
    for (int64_t j = 0; j < width; j += kL) store(sums + j, zero<T>());
    for (int64_t d = begin; d < end; d += kTogether) {
      const int64_t depth = end - d < kTogether ? end - d : kTogether;
      for (int64_t j = 0; j < width; j += kL) {
        vec<T> sum = load(sums + j);
        const int lanes = count - j < 0 ? 0 : count - j < kL ? int(count - j) : kL;
#if FC_HAS_PAIRS
        for_each_pair_column(
            keys + j * step + d, step, lanes, depth,
            [&](int64_t i, vec<T> column) { sum = add_pairs(sum, set1_pair(q + d + 2 * i), column); }, ahead);
#else
        for_each_column(
            keys + j * step + d, step, lanes, depth, [&](int64_t i, vec<T> column) { sum = fma(set1(q[d + i]), column, sum); },
            ahead);
#endif
        store(sums + j, sum);
      }
    }
  };
  chain(0, chains.begin(1), s);
  for (int64_t c = 1; c < chains.parts; ++c) {
    chain(chains.begin(c), chains.begin(c + 1), later);
    for (int64_t j = 0; j < width; j += kL) store(s + j, load(s + j) + load(later + j));
  }
}

// Fills s[m][j] with dot products. Of those keys that it returns, which are in `plain`, it has put the largest into tile.most.
template <class S, class T = compute_t<S>>
__attribute__((noinline)) KeyRange products(const ScoreTile<S>& tile, int64_t features, KeyRange plain) {
  constexpr int64_t kL = kLanes<T>;
  [[maybe_unused]] constexpr int kRows = AttentionTile<T>::kRows;
  const KeyRange vectors = whole_vectors<T>(tile.keys);
  const Panels<T>& panels = tile.panels;
  KeyRange measured{vectors.end, vectors.end};
  for (int64_t panel = panels.of(vectors.begin), end = panels.of(vectors.end - 1) + 1; panel < end; ++panel) {
    const int64_t first = panels.first(panel), width = panels.width(panel);
    KeyRange keys = meet({first, first + width}, vectors);
    const pack_t<S>* k = tile.k + first * panel_depth<S>(features);
    if (tile.loose) {
      const LooseKeys<S>& loose = *tile.loose;
      if (tile.rows.count == 1 && loose.stride.d == 1) {
        loose_products<S>(tile.q, loose, first, features, width, tile.s + first);
        continue;
      }
      pack_panel<S>(loose.source + first * loose.stride.l, loose.stride, loose.count - first, features, width, loose.panel);
      k = loose.panel;
    }
    k += (keys.begin - first) * (kPairs<S> ? 2 : 1);
    T* const s = tile.s + keys.begin;
    const int count = int((keys.end - keys.begin) / kL);
#if !FC_HAS_PAIRS
    const Parts chains = chains_of<S>(features);
    if (tile.rows.count < kRows || chains.parts > 1) {
      T* out[kRows];
      for (int64_t m = 0; m < tile.rows.count; ++m) out[m] = s + m * tile.s_step;
      const ColumnPiece piece{0, int32_t(count * kL), 0, 1};
      for (int64_t c = 0; c < chains.parts; ++c) {
        const int64_t d = chains.begin(c);
        const T* q[kRows];
        for (int64_t m = 0; m < tile.rows.count; ++m) q[m] = tile.q + m * tile.q_step + d;
        gemm_tile<T>(int(tile.rows.count), count, {q, 1, k + d * width, width, 1, chains.size(c)},
                     {out, &piece, 1, c > 0, false, Activation::none, nullptr, nullptr, nullptr, nullptr});
      }
      continue;
    }
#endif
    const auto measures = [&](KeyRange range) { return tile.most && range.begin >= plain.begin && range.end <= plain.end; };
    const bool measure = measures(keys);
    // Whole panels of one width are one call.
    int64_t run = 1;
    while (!tile.loose && panel + 1 < end && keys.begin == first && panels.width(panel + 1) == width &&
           keys.end + width <= vectors.end && measures({keys.end, keys.end + width}) == measure) {
      ++run, ++panel, keys.end += width;
    }
    T* const most = measure ? tile.most : nullptr;
#if FC_HAS_PAIRS
    score_pairs(int(tile.rows.count), count, {tile.q, tile.q_step, k, width, (features + 1) / 2}, run, s, tile.s_step, most);
#else
    score_strip<T>(count, {tile.q, tile.q_step, k, width, features}, run, s, tile.s_step, most);
#endif
    if (measure) measured = join(measured, keys);
  }
  return measured;
}

}  // namespace

template <class S>
void dot_products(const ScoreTile<S>& tile, int64_t features) {
  products(tile, features, {0, 0});
}

template <class T>
void multiply(int64_t rows, int64_t width, const Product<T>& product, bool accumulate) {
  using Tile = AttentionTile<T>;
  const Parts columns(width / kLanes<T>, Tile::kVectors), tiles(rows, Tile::kRows);
  for (int64_t part = 0; part < columns.parts; ++part) {
    const int64_t column = columns.begin(part) * kLanes<T>;
    const int vectors = int(columns.size(part));
    const ColumnPiece piece{0, int32_t(vectors * kLanes<T>), 0, 1};
    for (int64_t t = 0; t < tiles.parts; ++t) {
      const int64_t first = tiles.begin(t), count = tiles.size(t);
      const T* a[Tile::kRows];
      T* out[Tile::kRows];
      for (int64_t m = 0; m < count; ++m) {
        a[m] = product.a + (first + m) * product.a_row;
        out[m] = product.out + (first + m) * product.out_step + column;
      }
      gemm_tile<T>(int(count), vectors, {a, product.a_step, product.b + column, product.b_step, 1, product.depth},
                   {out, &piece, 1, accumulate, false, Activation::none, nullptr, nullptr, nullptr, nullptr});
    }
  }
}

template <class T>
void multiply_tile(int64_t rows, int64_t width, const Product<T>& product, const T* shrink) {
  using Tile = AttentionTile<T>;
  constexpr int64_t kL = kLanes<T>;
  const Parts columns(width / kL, Tile::kVectors);
  for (int64_t part = 0; part < columns.parts; ++part) {
    const int64_t column = columns.begin(part) * kL;
    const int vectors = int(columns.size(part));
    T* const y = product.out + column;
    if (rows == Tile::kRows) {
      value_strip<T>(vectors, {product.a, product.a_row, product.b + column, product.b_step, product.depth}, y, product.out_step,
                     shrink);
      continue;
    }
    T sums[Tile::kRows * Tile::kPanel];
    const T* a[Tile::kRows];
    T* out[Tile::kRows];
    for (int64_t m = 0; m < rows; ++m) {
      a[m] = product.a + m * product.a_row;
      out[m] = shrink ? sums + m * Tile::kPanel : y + m * product.out_step;
    }
    const ColumnPiece piece{0, int32_t(vectors * kL), 0, 1};
    gemm_tile<T>(int(rows), vectors, {a, 1, product.b + column, product.b_step, 1, product.depth},
                 {out, &piece, 1, false, false, Activation::none, nullptr, nullptr, nullptr, nullptr});
    if (!shrink) continue;
    for (int64_t m = 0; m < rows; ++m) {
      for (int64_t c = 0; c < vectors * kL; c += kL) {
        T* const to = y + m * product.out_step + c;
        store(to, fma(load(to), set1(shrink[m]), load(out[m] + c)));
      }
    }
  }
}

template <class S>
compute_t<S> scores(const SdpaProblem& a, const SdpaArgs& args, const ScoreTile<S>& tile) {
  using T = compute_t<S>;
  constexpr int64_t kL = kLanes<T>;
  const KeyRange vectors = whole_vectors<T>(tile.keys);
  // In log 2 the factor stays well above the smallest numbers: what is hidden is -inf, and 0 * -inf would be NaN.
  const double factor = (a.scale < 0 ? -a.scale : a.scale) * kLog2e;
  const bool altered = a.mask_kind != MaskKind::none || a.bias.given || a.softcap != 0 || factor < 1e-20;
  if (tile.most) {
    for (int64_t m = 0; m < tile.rows.count; ++m) store(tile.most + m * kL, set1(-kInfinity<T>));
  }
  const KeyRange plain = seen_by_all(a, tile), measured = products(tile, a.D, altered ? KeyRange{0, 0} : plain);
  if (altered) alter(a, args, tile, vectors);
  if (plain.begin > vectors.begin || plain.end < vectors.end) {
    QueryRow at = query_row(a, tile.rows.hkv, tile.rows.first);
    for (int64_t m = 0; m < tile.rows.count; ++m, advance(a, at)) {
      KeyRange keys = visible_keys(a, at.i);
      keys = meet({keys.begin - tile.first_key, keys.end - tile.first_key}, vectors);
      if (keys.empty()) keys = {vectors.end, vectors.end};
      T* row = tile.s + m * tile.s_step;
      fill_from(row, vectors.begin, keys.begin, -kInfinity<T>);
      fill_from(row, keys.end, vectors.end, -kInfinity<T>);
    }
  }
  if (tile.most) {
    for (int64_t m = 0; m < tile.rows.count; ++m) {
      const T* const s = tile.s + m * tile.s_step;
      vec<T> most = load(tile.most + m * kL);
      for (int64_t j = vectors.begin; j < measured.begin; j += kL) most = max(load(s + j), most);
      for (int64_t j = measured.end; j < vectors.end; j += kL) most = max(load(s + j), most);
      store(tile.most + m * kL, most);
    }
  }
  return altered ? T(1) : T(factor);
}

template <class S>
void pack_rows(const S* source, const SdpaStride& stride, int64_t count, int64_t features, int64_t width, pack_t<S>* rows) {
#if FC_HAS_PAIRS
  for (int64_t l = 0; l < count; ++l, source += stride.l, rows += width) {
    if (stride.d == 1) __builtin_memcpy(rows, source, size_t(features) * sizeof(S));
    for (int64_t d = 0; stride.d != 1 && d < features; ++d) rows[d] = source[d * stride.d];
    for (int64_t d = features; d < width; ++d) rows[d] = S{0};
  }
#else
  using T = compute_t<S>;
  constexpr int64_t kL = kLanes<T>;
  if (stride.d != 1) {
    const int64_t offset = 0;
    return pack_filters<S>({source, stride.d, stride.l, &offset, 1, count}, features, width, rows);
  }
  for (int64_t l = 0; l < count; ++l, source += stride.l, rows += width) {
    int64_t d = 0;
    for (; d + kL <= features; d += kL) store(rows + d, load(source + d));
    if (d < width) store(rows + d, load(source + d, int(features - d)), int(width - d));
  }
#endif
}

template <class S>
void pack_unit_rows(const SdpaProblem& a, const UnitRows& place, const S* source, const SdpaStride& stride, int64_t features,
                    int64_t width, pack_t<S>* rows) {
  QueryRow row = query_row(a, place.hkv, place.first);
  for (int64_t left = place.count; left > 0;) {
    const int64_t count = left < a.Lq - row.i ? left : a.Lq - row.i;  // of one head
    pack_rows<S>(source + place.b * stride.b + row.h * stride.h + row.i * stride.l, stride, count, features, width, rows);
    rows += count * width, left -= count;
    row = {row.h + 1, 0};
  }
}

template <class S>
void pack_queries(const SdpaProblem& a, const UnitRows& place, void* q, int64_t width, pack_t<S>* rows) {
  pack_unit_rows<S>(a, place, static_cast<const S*>(q), a.q, a.D, width, rows);
  if (a.scale < 0) {
    for (int64_t i = 0; i < place.count * width; ++i) {
#if FC_HAS_PAIRS
      rows[i].bits ^= 0x8000;
#else
      rows[i] = -rows[i];
#endif
    }
  }
}

template <class S>
void pack_panels(const S* source, const SdpaStride& stride, int64_t count, int64_t features, KeyRange keys, pack_t<S>* panels) {
  const Panels<compute_t<S>> all(count);
  for (int64_t panel = all.of(keys.begin), end = all.of(keys.end - 1) + 1; panel < end; ++panel) {
    const int64_t first = all.first(panel);
    pack_panel<S>(source + first * stride.l, stride, count - first, features, all.width(panel),
                  panels + first * panel_depth<S>(features));
  }
}

#define FC_ATTENTION(S)                                                                                               \
  template compute_t<S> scores<S>(const SdpaProblem&, const SdpaArgs&, const ScoreTile<S>&);                          \
  template void dot_products<S>(const ScoreTile<S>&, int64_t);                                                        \
  template void pack_rows<S>(const S*, const SdpaStride&, int64_t, int64_t, int64_t, pack_t<S>*);                     \
  template void pack_queries<S>(const SdpaProblem&, const UnitRows&, void*, int64_t, pack_t<S>*);                     \
  template void pack_unit_rows<S>(const SdpaProblem&, const UnitRows&, const S*, const SdpaStride&, int64_t, int64_t, \
                                  pack_t<S>*);                                                                        \
  template void pack_panels<S>(const S*, const SdpaStride&, int64_t, int64_t, KeyRange, pack_t<S>*);
FC_ATTENTION(bf16)
#if !FC_HAS_PAIRS
FC_ATTENTION(float)
FC_ATTENTION(double)
FC_ATTENTION(f16)
template void multiply(int64_t, int64_t, const Product<float>&, bool);
template void multiply(int64_t, int64_t, const Product<double>&, bool);
template void multiply_tile(int64_t, int64_t, const Product<float>&, const float*);
template void multiply_tile(int64_t, int64_t, const Product<double>&, const double*);
#endif
#undef FC_ATTENTION

}  // namespace fastconv::FASTCONV_TARGET

// What attention's forward and backward share: how queries and keys are cut up, and the scores of a tile of queries.
//
// A unit is one head of keys and values of one batch element; its rows are the queries of all heads that share it, one after the
// other. Keys are cut into blocks and blocks into segments at places that depend on Lkv alone, and so do all sums over keys.
//
// Operands are stored as S; what is packed, and everything that is computed, has the type T = compute_t<S>. Where products are
// taken of pairs (kPairs<S>), what is packed for them stays S: rows padded to pairs, panels of pairs.
#pragma once

#include "core/kernel.h"
#include "cpu/blocks/gemm_tile.h"
#include "cpu/blocks/split.h"
#include "cpu/simd/half.h"

namespace fastconv::FASTCONV_TARGET {

// What rows and panels of queries, keys and values are packed as.
template <class S>
struct pack_of {
  using type = compute_t<S>;
};
#if FC_HAS_PAIRS
template <>
struct pack_of<bf16> {
  using type = bf16;
};
#endif
template <class S>
using pack_t = typename pack_of<S>::type;

// What a column of a panel holds of so many features, or of so many keys.
template <class S>
FC_INLINE int64_t panel_depth(int64_t depth) {
  return kPairs<S> ? round_up(depth, 2) : depth;
}

// The register tile has gemm_tile's size: 6 queries x 64 keys with AVX-512, where the scores of a tile against a block of keys
// take 6 KB of the 32 KB L1 and the panel of keys that is being multiplied 16 KB at 64 features.
template <class T>
struct AttentionTile {
  static constexpr int kVectors = GemmTile::kMaxVectors;
  static constexpr int64_t kRows = GemmTile::rows(kVectors);
  // A number for each row, in whole vectors.
  static constexpr int64_t kRowLanes = (kRows + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  static constexpr int64_t kPanel = int64_t(kVectors) * kLanes<T>;  // keys
  static constexpr int64_t kKeys = 1024 / kPanel * kPanel;          // most of a block
};

// Keys of a block: as many as they and their values take half of the L2, because what is done once for each query and block is a
// twentieth of 512 keys at 64 features (1024 of them: 77.0 % of peak against 76.1, causal 71.9 against 70.8).
template <class T>
FC_INLINE int64_t block_keys(const SdpaProblem& a) {
  constexpr int64_t kPanel = AttentionTile<T>::kPanel, kFew = 256, kBytes = FC_HAS_PAIRS ? sizeof(bf16) : sizeof(T);
  int64_t keys = AttentionTile<T>::kKeys;
  while (keys > kFew && (a.D + a.Dv) * kBytes * keys > 512 * 1024) keys /= 2;
  return keys / kPanel * kPanel;
}

// A segment is what threads may share out where there are few queries: 1000 keys or more, so that adding up segments costs
// nothing, and at most 16, which bounds what their partial results take.
template <class T>
FC_INLINE int64_t segment_keys(const SdpaProblem& a) {
  constexpr int64_t kMost = 16;
  const int64_t keys = block_keys<T>(a), least = 1024 / keys, even = (a.Lkv + kMost * keys - 1) / (kMost * keys);
  return keys * (even > least ? even : least);
}
template <class T>
FC_INLINE int64_t segment_count(const SdpaProblem& a) {
  const int64_t keys = segment_keys<T>(a);
  return (a.Lkv + keys - 1) / keys;
}

// EvenSplit for inner loops: the larger parts come first, and only the constructor divides (40 cycles for 64 bits).
struct Parts {
  int64_t parts, least, larger;
  FC_INLINE Parts(int64_t count, int64_t most)
      : parts((count + most - 1) / most), least(parts ? uint32_t(count) / uint32_t(parts) : 0), larger(count - parts * least) {}
  FC_INLINE int64_t begin(int64_t part) const { return part * least + (part < larger ? part : larger); }
  FC_INLINE int64_t size(int64_t part) const { return least + (part < larger); }
};

// The panels of a block of keys: as few as kPanel allows and as even as whole vectors are, because a panel of its own for the
// last 5 keys would be one of 6 chains that wait for each other.
template <class T>
struct Panels : Parts {
  FC_INLINE explicit Panels(int64_t keys) : Parts((keys + kLanes<T> - 1) / kLanes<T>, AttentionTile<T>::kVectors) {}
  FC_INLINE int64_t first(int64_t panel) const { return begin(panel) * kLanes<T>; }
  FC_INLINE int64_t width(int64_t panel) const { return size(panel) * kLanes<T>; }
  // The panel that a key of the block lies in.
  FC_INLINE int64_t of(int64_t key) const {
    const int64_t vector = key / kLanes<T>;
    int64_t panel = vector / AttentionTile<T>::kVectors;  // if all before it are full
    while (begin(panel + 1) <= vector) ++panel;
    return panel;
  }
};

struct KeyRange {
  int64_t begin, end;  // empty when end <= begin
  FC_INLINE bool empty() const { return end <= begin; }
};

FC_INLINE KeyRange meet(KeyRange a, KeyRange b) { return {a.begin > b.begin ? a.begin : b.begin, a.end < b.end ? a.end : b.end}; }
FC_INLINE KeyRange join(KeyRange a, KeyRange b) {
  if (a.empty() || b.empty()) return a.empty() ? b : a;
  return {a.begin < b.begin ? a.begin : b.begin, a.end > b.end ? a.end : b.end};
}

// Row r of a unit: query i of head h.
struct QueryRow {
  int64_t h, i;
};
FC_INLINE int64_t unit_rows(const SdpaProblem& a) { return a.Hq / a.Hkv * a.Lq; }
// The divisions would be 3 % of a tile.
FC_INLINE QueryRow query_row(const SdpaProblem& a, int64_t hkv, int64_t r) {
  if (a.Hq == a.Hkv) return {hkv, r};
  return {hkv * (a.Hq / a.Hkv) + r / a.Lq, r % a.Lq};
}
// The next row. Dividing for every row of a tile would cost as much as a tenth of its scores.
FC_INLINE void advance(const SdpaProblem& a, QueryRow& row) {
  if (++row.i == a.Lq) row.i = 0, ++row.h;
}
FC_INLINE KeyRange visible_keys(const SdpaProblem& a, int64_t i) {
  return meet({i + a.band.low, i + a.band.high + 1}, {0, a.Lkv});
}
// Whether some query sees only a part of the keys.
FC_INLINE bool is_banded(const SdpaProblem& a) { return a.band.low > 1 - a.Lq || a.band.high < a.Lkv - 1; }

// All keys that rows begin .. begin + count - 1 of a unit see.
FC_INLINE KeyRange visible_keys(const SdpaProblem& a, int64_t begin, int64_t count) {
  if (!is_banded(a)) return {0, a.Lkv};
  KeyRange all{0, 0};
  QueryRow row = query_row(a, 0, begin);
  for (int64_t m = 0; m < count; ++m, advance(a, row)) all = join(all, visible_keys(a, row.i));
  return all;
}

// p[b][h][l] + offset of a tensor with these strides.
template <class T>
FC_INLINE T* at(void* p, const SdpaStride& s, int64_t b, int64_t h, int64_t l) {
  return static_cast<T*>(p) + b * s.b + h * s.h + l * s.l;
}

// Rows first .. first + count - 1 of one unit.
struct UnitRows {
  int64_t b, hkv, first, count;
};

// Keys as they lie, `count` of a block from `source` on.
template <class S>
struct LooseKeys {
  const S* source;
  SdpaStride stride;
  int64_t count;
  pack_t<S>* panel;  // [D][kPanel]: each is packed here when it is its turn, and is multiplied while it is in the L1
};

// At most AttentionTile::kRows rows against a block of keys.
template <class S>
struct ScoreTile {
  using T = compute_t<S>;
  using P = pack_t<S>;
  UnitRows rows;
  int64_t first_key;  // of the block
  Panels<T> panels;   // of the block
  KeyRange keys;      // those that some row sees, counted from first_key
  const P* q;         // [rows][q_step], as pack_queries lays them
  int64_t q_step;
  const P* k;  // as pack_panels lays them
  T* s;        // [rows][s_step]
  int64_t s_step;
  T* slope;                             // [rows][s_step]: what the softcap makes of a small change, where that is wanted
  T* most = nullptr;                    // [rows][lanes]: the largest scores of each row lane by lane, where they are wanted
  const LooseKeys<S>* loose = nullptr;  // in place of k, where no other tile reads these keys
};

// Fills s[m][j] for the whole vectors that cover `keys`, -inf where a query does not see a key. What is there times the returned
// factor, which is never negative, is the score in units of log 2.
template <class S>
compute_t<S> scores(const SdpaProblem& a, const SdpaArgs& args, const ScoreTile<S>& tile);

// The plain product of panels: s[m][j] = sum over d of q[m][d] * k[j][d], for the whole vectors that cover `keys`.
template <class S>
void dot_products(const ScoreTile<S>& tile, int64_t features);

// out[m][c] = sum over d < depth of a[m*a_row + d*a_step] * b[d*b_step + c], plus what is there when `accumulate`. The width is a
// multiple of the lanes.
template <class T>
struct Product {
  const T* a;
  int64_t a_row, a_step;
  const T* b;
  int64_t b_step, depth;
  T* out;
  int64_t out_step;
};
template <class T>
void multiply(int64_t rows, int64_t width, const Product<T>& product, bool accumulate);

// The same for no more rows than a tile has and with a_step 1, plus shrink[m] times what is there where `shrink` is given.
template <class T>
void multiply_tile(int64_t rows, int64_t width, const Product<T>& product, const T* shrink);

// `count` positions of a head as rows [position][width], zeros from feature `features` on; the width is a multiple of the lanes.
template <class S>
void pack_rows(const S* source, const SdpaStride& stride, int64_t count, int64_t features, int64_t width, pack_t<S>* rows);

// The same for `count` rows of a unit, from a tensor with a head for each head of queries.
template <class S>
void pack_unit_rows(const SdpaProblem& a, const UnitRows& place, const S* source, const SdpaStride& stride, int64_t features,
                    int64_t width, pack_t<S>* rows);

// Queries of a unit, negated where the scale is negative: what follows then only knows scales that are not.
template <class S>
void pack_queries(const SdpaProblem& a, const UnitRows& place, void* q, int64_t width, pack_t<S>* rows);

// Those panels of a block of `count` keys that cover `keys`: [features][width], first * panel_depth elements behind `panels`.
template <class S>
void pack_panels(const S* source, const SdpaStride& stride, int64_t count, int64_t features, KeyRange keys, pack_t<S>* panels);

template <class P, class T = compute_t<P>>
FC_INLINE bool all_finite(const P* p, int64_t count) {
  constexpr int kChains = 4;
  constexpr int64_t kL = kLanes<T>;
  vec<T> sum[kChains] = {zero<T>(), zero<T>(), zero<T>(), zero<T>()};  // 0 * x is NaN for an infinity and for NaN, and stays so
  int64_t i = 0;
  for (; i + kChains * kL <= count; i += kChains * kL) {
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) sum[c] = fma(load(p + i + c * kL), zero<T>(), sum[c]);
  }
  for (; i < count; i += kL) sum[0] = fma(load(p + i), zero<T>(), sum[0]);
  return reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3])) == 0;
}

#define FC_ATTENTION(S)                                                                                                      \
  extern template compute_t<S> scores<S>(const SdpaProblem&, const SdpaArgs&, const ScoreTile<S>&);                          \
  extern template void dot_products<S>(const ScoreTile<S>&, int64_t);                                                        \
  extern template void pack_rows<S>(const S*, const SdpaStride&, int64_t, int64_t, int64_t, pack_t<S>*);                     \
  extern template void pack_queries<S>(const SdpaProblem&, const UnitRows&, void*, int64_t, pack_t<S>*);                     \
  extern template void pack_unit_rows<S>(const SdpaProblem&, const UnitRows&, const S*, const SdpaStride&, int64_t, int64_t, \
                                         pack_t<S>*);                                                                        \
  extern template void pack_panels<S>(const S*, const SdpaStride&, int64_t, int64_t, KeyRange, pack_t<S>*);
FC_ATTENTION(bf16)
#if !FC_HAS_PAIRS
FC_ATTENTION(float)
FC_ATTENTION(double)
FC_ATTENTION(f16)
extern template void multiply(int64_t, int64_t, const Product<float>&, bool);
extern template void multiply(int64_t, int64_t, const Product<double>&, bool);
extern template void multiply_tile(int64_t, int64_t, const Product<float>&, const float*);
extern template void multiply_tile(int64_t, int64_t, const Product<double>&, const double*);
#endif
#undef FC_ATTENTION

}  // namespace fastconv::FASTCONV_TARGET

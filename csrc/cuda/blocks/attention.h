// What attention's kernels share: whose row is which, which keys a query sees, and what a product of their features becomes.
//
// A unit is one head of keys and values of one batch element; its rows are the queries of all heads that share it, one head after
// the other, so that the heads of a group read their keys together. Blocks take tiles of rows or of keys that start at multiples
// of the tile, and sums go through the other side tile by tile: their order depends on the problem alone.
#pragma once

#include "cuda/blocks/dropout.h"
#include "cuda/blocks/element.h"
#include "cuda/blocks/place.h"

namespace fastconv::sm80 {

inline constexpr int kMostFeatures = 256;
// What a block gets of an sm_86 or sm_89; an sm_80 has 163 KB.
inline constexpr int64_t kSharedAtMost = 99 << 10;
inline constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;

FC_INLINE float minus_infinity() { return -__builtin_inff(); }

// One call, as its kernels get it.
struct AttentionCall {
  SdpaProblem a;
  SdpaArgs args;
  Divisor queries, keys;  // rows of a unit to head and position; keys likewise, of the only head
  Divisor heads, units;   // units to b, hkv; blocks to unit
  int rows;
  float factor, scale, cap, inverse_cap;  // factor is the scale in units of log 2
  float keep;                             // of dropout: 1 / (1 - p)
  uint32_t threshold;
  bool altered;                                // scores are more than a product
  bool packs_q, packs_k, packs_v, packs_dout;  // whole, aligned packs of features
};

template <class T>
AttentionCall attention_call(const SdpaProblem& a, const SdpaArgs& args) {
  const auto packs = [&](const void* p, const SdpaStride& s, int64_t heads, int64_t length, int64_t features) {
    return s.d == 1 && features % kWide<T> == 0 && packs_fit<T>(p, {{a.B, s.b}, {heads, s.h}, {length, s.l}});
  };
  AttentionCall t{};
  t.a = a, t.args = args;
  t.queries = Divisor::by(a.Lq), t.keys = Divisor::by(a.Lkv > 0 ? a.Lkv : 1);
  t.heads = Divisor::by(a.Hkv), t.units = Divisor::by(a.B * a.Hkv);
  t.rows = int(a.Hq / a.Hkv * a.Lq);
  t.scale = float(a.scale), t.factor = float(a.scale * 1.4426950408889634);
  t.cap = float(a.softcap), t.inverse_cap = a.softcap != 0 ? float(1 / a.softcap) : 0;
  t.keep = a.dropout.p < 1 ? float(1 / (1 - a.dropout.p)) : 0;
  t.threshold = dropout_threshold(a.dropout.p);
  t.altered = a.mask_kind != MaskKind::none || a.bias.given || a.softcap != 0;
  t.packs_q = packs(args.q, a.q, a.Hq, a.Lq, a.D);
  t.packs_k = packs(args.k, a.k, a.Hkv, a.Lkv, a.D), t.packs_v = packs(args.v, a.v, a.Hkv, a.Lkv, a.Dv);
  t.packs_dout = args.dout && packs(args.dout, a.dout, a.Hq, a.Lq, a.Dv);
  return t;
}

FC_INLINE int64_t tiles_of(int64_t count, int tile) { return (count + tile - 1) / tile; }

inline const char* attention_reject(const SdpaProblem& a) {
  if (a.B <= 0 || a.Lq <= 0 || a.Hq <= 0) return "there is no query";
  if (a.D > kMostFeatures || a.Dv > kMostFeatures) return "a query or a value has more than 256 features";
  const int64_t rows = a.Hq / a.Hkv * a.Lq, most = rows > a.Lkv ? rows : a.Lkv;
  if (most > kMostThreads - 64) return "a head has more than 2^30 queries or keys";
  return a.B * a.Hkv > kMostThreads / tiles_of(most, 64) ? "there are more than 2^30 tiles of queries or keys" : nullptr;
}

// --- rows

struct AttentionUnit {
  int64_t b, hkv;
};

FC_DEVICE AttentionUnit attention_unit(const AttentionCall& t, uint32_t number) {
  uint32_t b = number;
  const int64_t hkv = t.heads.take(b);
  return {b, hkv};
}

// Rows 0 .. count - 1 of one unit of a tensor.
template <class T>
struct UnitRows {
  T* p;
  int64_t head, position, feature;  // strides
  Divisor per_head;
  int count, features;
  bool packs;

  FC_DEVICE T* at(int r) const {
    uint32_t h = uint32_t(r);
    const int64_t l = per_head.take(h);
    return p + int64_t(h) * head + l * position;
  }
  FC_DEVICE bool has(int r) const { return r >= 0 && r < count; }
};

template <class T>
FC_DEVICE UnitRows<T> query_rows(const AttentionCall& t, AttentionUnit u, void* p, const SdpaStride& s, int64_t features,
                                 bool packs) {
  T* first = static_cast<T*>(p) + u.b * s.b + u.hkv * (t.a.Hq / t.a.Hkv) * s.h;
  return {first, s.h, s.l, s.d, t.queries, t.rows, int(features), packs};
}
template <class T>
FC_DEVICE UnitRows<T> key_rows(const AttentionCall& t, AttentionUnit u, void* p, const SdpaStride& s, int64_t features,
                               bool packs) {
  return {static_cast<T*>(p) + u.b * s.b + u.hkv * s.h, s.h, s.l, s.d, t.keys, int(t.a.Lkv), int(features), packs};
}

// --- which keys a query sees

struct KeyRange {
  int begin, end;  // empty when end <= begin
};

FC_DEVICE KeyRange visible_keys(const AttentionCall& t, int64_t i) {
  const auto existing = [&](int64_t j) { return int(j < 0 ? 0 : j < t.a.Lkv ? j : t.a.Lkv); };
  return {existing(i + t.a.band.low), existing(i + t.a.band.high + 1)};
}

// Whether rows first .. first + count - 1 of a unit might see one of the keys key .. key + keys - 1. Both ends of what a query
// sees grow with its position.
FC_DEVICE bool meet(const AttentionCall& t, int first, int count, int key, int keys) {
  const int last = first + count < t.rows ? first + count - 1 : t.rows - 1;
  uint32_t h = uint32_t(first), h_last = uint32_t(last);
  const uint32_t i = t.queries.take(h), i_last = t.queries.take(h_last);
  const KeyRange low = visible_keys(t, h == h_last ? i : 0), high = visible_keys(t, h == h_last ? i_last : t.a.Lq - 1);
  return low.begin < key + keys && high.end > key;
}

// Whether all of them see all of these keys, which exist.
FC_DEVICE bool meet_wholly(const AttentionCall& t, int first, int count, int key, int keys) {
  if (first + count > t.rows) return false;
  uint32_t h = uint32_t(first), h_last = uint32_t(first + count - 1);
  const uint32_t i = t.queries.take(h), i_last = t.queries.take(h_last);
  const KeyRange low = visible_keys(t, h == h_last ? i : 0), high = visible_keys(t, h == h_last ? i_last : t.a.Lq - 1);
  return high.begin <= key && low.end >= key + keys;
}

// --- scores

// What is known of a query besides its features. Of a row that does not exist: it sees nothing.
struct Query {
  int64_t mask, bias;  // where key 0 has its numbers
  KeyRange keys;
  DropoutRow dropout;
  FC_DEVICE bool sees(int j) const { return j >= keys.begin && j < keys.end; }
};

// Its number among all (b, h, i), -1 of a row that does not exist.
FC_DEVICE int64_t query_place(const AttentionCall& t, AttentionUnit u, int r) {
  if (r >= t.rows) return -1;
  uint32_t in_group = uint32_t(r);
  const int64_t i = t.queries.take(in_group);
  return (u.b * t.a.Hq + u.hkv * (t.a.Hq / t.a.Hkv) + in_group) * t.a.Lq + i;
}

FC_DEVICE Query query(const AttentionCall& t, AttentionUnit u, int r) {
  if (r >= t.rows) return {0, 0, {0, 0}, {0, 0}};
  uint32_t in_group = uint32_t(r);
  const int64_t i = t.queries.take(in_group), h = u.hkv * (t.a.Hq / t.a.Hkv) + in_group;
  return {u.b * t.a.mask.b + h * t.a.mask.h + i * t.a.mask.l,
          u.b * t.a.bias.b + h * t.a.bias.h + (t.a.Lq - 1 - i) * t.a.bias.distance, visible_keys(t, i),
          dropout_row(t.a.dropout.key, query_place(t, u, r))};
}

// The score of a key that the query sees, in units of log 2, from the product of their features; `slope` is what the softcap
// makes of a small change. -inf where a boolean mask hides the key, whatever the product is.
template <class T>
FC_DEVICE float score(const AttentionCall& t, const Query& q, int j, float product, float& slope) {
  slope = 1;
  if (!t.altered) return product * t.factor;
  float x = product * t.scale;
  if (t.cap != 0) {
    const float bent = tanhf(x * t.inverse_cap);
    slope = 1 - bent * bent;
    x = t.cap * bent;
  }
  if (t.a.mask_kind != MaskKind::none) {
    const int64_t at = q.mask + j * t.a.mask.d;
    if (t.a.mask_kind == MaskKind::boolean) {
      if (!static_cast<const uint8_t*>(t.args.mask)[at]) return minus_infinity();
    } else {
      x += t.a.mask_kind == MaskKind::wide ? static_cast<const float*>(t.args.mask)[at]
                                           : to_float(static_cast<const T*>(t.args.mask)[at]);
    }
  }
  if (t.a.bias.given) x += static_cast<const float*>(t.args.bias)[q.bias + j * t.a.bias.distance];
  return x * kLog2e;
}

// What dropout multiplies a weight with.
FC_DEVICE float kept(const AttentionCall& t, const Query& q, int j) {
  return t.threshold == 0 || dropout_keeps(q.dropout, j, t.threshold) ? t.keep : 0.0f;
}

// Whether `mine` holds for any thread of the block. `votes` has a place for each warp, and is free again after the block's next
// barrier.
FC_DEVICE bool any_of_block(bool* votes, bool mine) {
  const bool any = __any_sync(0xFFFFFFFFu, mine);
  if (threadIdx.x % kWarp == 0) votes[threadIdx.x / kWarp] = any;
  __syncthreads();
  bool found = false;
  for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) found = found || votes[warp];
  return found;
}

FC_DEVICE bool is_finite(float x) { return x - x == 0; }

}  // namespace fastconv::sm80

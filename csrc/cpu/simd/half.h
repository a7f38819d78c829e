// Half precision as a way to store floats: bf16 and f16 become vec<float> when loaded and are rounded to the nearest (ties to
// even) when stored. Nothing is computed in them.
#pragma once

#include "cpu/simd/vec.h"

namespace fastconv::FASTCONV_TARGET {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// What numbers that are stored as S are computed in.
template <class S>
struct compute_of {
  using type = S;
};
template <>
struct compute_of<bf16> {
  using type = float;
};
template <>
struct compute_of<f16> {
  using type = float;
};
template <class S>
using compute_t = typename compute_of<S>::type;

template <class S>
inline constexpr bool kIsHalf = sizeof(S) == 2;
template <class S>
inline constexpr bool kIsBf16 = false;
template <>
inline constexpr bool kIsBf16<bf16> = true;

// Whether products of S are taken of pairs, by VDPBF16PS: two bf16 that lie side by side along what is summed, in each lane of a
// vector of floats. It rounds sums to nearest even and takes subnormal numbers, operands and results, for zeros.
#define FC_PAIRS_scalar 0
#define FC_PAIRS_avx2 0
#define FC_PAIRS_avx512 0
#define FC_PAIRS_avx512_bf16 1
#define FC_HAS_PAIRS FC_CONCAT(FC_PAIRS_, FASTCONV_TARGET)
template <class S>
inline constexpr bool kPairs = kIsBf16<S> && FC_HAS_PAIRS;

#if FC_TARGET_LEVEL == 2

using half_lanes = __m256i;  // as many halves as vec<float> has lanes
FC_INLINE half_lanes load_halves(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
FC_INLINE half_lanes load_halves(const void* p, int lo, int hi) {
  return _mm256_maskz_loadu_epi16(__mmask16(lane_range<float>(lo, hi)), p);
}
FC_INLINE void store_halves(void* p, half_lanes x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
FC_INLINE void store_halves(void* p, half_lanes x, int n) { _mm256_mask_storeu_epi16(p, __mmask16(lane_range<float>(0, n)), x); }
template <class S>
FC_INLINE vec<float> widen(half_lanes x) {
  if constexpr (kIsBf16<S>) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))};
  } else {
    return {_mm512_cvtph_ps(x)};
  }
}
template <class S>
FC_INLINE half_lanes narrow(vec<float> a) {
  if constexpr (kPairs<S>) {
    return (half_lanes)_mm512_cvtneps_pbh(a.v);
  } else if constexpr (kIsBf16<S>) {
    const __m512i bits = _mm512_castps_si512(a.v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    // Rounding could carry a NaN's mantissa into its sign.
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __m512i all = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), quiet);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(all, 16));
  } else {
    return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
}

#else

// There is no masked access to 16 bits: the lanes of a tail are moved one by one.
typedef uint16_t half_lanes __attribute__((vector_size(kVectorBytes / 2)));
FC_INLINE half_lanes load_halves(const void* p) {
  half_lanes x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
FC_INLINE half_lanes load_halves(const void* p, int lo, int hi) {
  half_lanes x{};
  for (int i = lo < 0 ? 0 : lo; i < hi && i < kLanes<float>; ++i) x[i] = static_cast<const uint16_t*>(p)[i];
  return x;
}
FC_INLINE void store_halves(void* p, half_lanes x) { __builtin_memcpy(p, &x, sizeof x); }
FC_INLINE void store_halves(void* p, half_lanes x, int n) {
  for (int i = 0; i < n && i < kLanes<float>; ++i) static_cast<uint16_t*>(p)[i] = x[i];
}

#if FC_TARGET_LEVEL == 1

template <class S>
FC_INLINE vec<float> widen(half_lanes x) {
  if constexpr (kIsBf16<S>) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)x), 16))};
  } else {
    return {_mm256_cvtph_ps((__m128i)x)};
  }
}
template <class S>
FC_INLINE half_lanes narrow(vec<float> a) {
  if constexpr (kIsBf16<S>) {
    const __m256i bits = _mm256_castps_si256(a.v), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    // Rounding could carry a NaN's mantissa into its sign.
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
    const __m256i all = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
    return (half_lanes)_mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(all, all), _MM_SHUFFLE(3, 1, 2, 0)));
  } else {
    return (half_lanes)_mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT);
  }
}

#else

FC_INLINE float float_of(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}
FC_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}
// f16 has 5 bits of exponent with bias 15 and 10 of mantissa, a float 8 with bias 127 and 23.
FC_INLINE float widen_f16(uint32_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, size = half & 0x7FFFu;
  if (size >= 0x7C00u) return float_of(sign | 0x7F800000u | size << 13);
  if (size >= 0x0400u) return float_of(sign | ((size << 13) + (112u << 23)));
  return float_of(sign | bits_of(float(size) * 0x1p-24f));
}
FC_INLINE uint32_t narrow_f16(uint32_t bits) {
  const uint32_t sign = bits >> 16 & 0x8000u, size = bits & 0x7FFFFFFFu;
  if (size > 0x7F800000u) return sign | 0x7E00u | (size >> 13 & 0x3FFu);
  if (size >= 0x477FF000u) return sign | 0x7C00u;  // 65520 and more
  // Below 2^-14 a half counts in units of 2^-24, which is what adding 1/2 rounds to.
  if (size < 0x38800000u) return sign | (bits_of(float_of(size) + 0.5f) - 0x3F000000u);
  return sign | (size + 0xFFFu + (size >> 13 & 1) - (112u << 23)) >> 13;
}
FC_INLINE uint32_t narrow_bf16(uint32_t bits) {
  // Rounding could carry a NaN's mantissa into its sign.
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return bits >> 16 | 0x40u;
  return (bits + 0x7FFFu + (bits >> 16 & 1)) >> 16;
}
template <class S>
FC_INLINE vec<float> widen(half_lanes x) {
  vec<float> r;
  for (int i = 0; i < kLanes<float>; ++i) r.v[i] = kIsBf16<S> ? float_of(uint32_t(x[i]) << 16) : widen_f16(x[i]);
  return r;
}
template <class S>
FC_INLINE half_lanes narrow(vec<float> a) {
  half_lanes x;
  for (int i = 0; i < kLanes<float>; ++i)
    x[i] = uint16_t(kIsBf16<S> ? narrow_bf16(bits_of(a.v[i])) : narrow_f16(bits_of(a.v[i])));
  return x;
}

#endif
#endif

// Of vectors of two bf16 a lane: the lower ones and the upper ones.
FC_INLINE vec<float> widen_lower(vec<float> pairs) { return {(vec<float>::raw)((index_vec<float>::raw)pairs.v << 16)}; }
FC_INLINE vec<float> widen_upper(vec<float> pairs) { return {(vec<float>::raw)((index_vec<float>::raw)pairs.v & ~0xFFFF)}; }

#if FC_HAS_PAIRS
// Lane by lane sum + the products of both pairs.
FC_INLINE vec<float> add_pairs(vec<float> sum, vec<float> a, vec<float> b) {
  return {_mm512_dpbf16_ps(sum.v, (__m512bh)a.v, (__m512bh)b.v)};
}
// The pair that starts at p in every lane.
FC_INLINE vec<float> set1_pair(const bf16* p) {
  float pair;
  __builtin_memcpy(&pair, p, sizeof pair);
  return {_mm512_set1_ps(pair)};
}
// 32 numbers as bf16, side by side.
FC_INLINE vec<float> narrow_pairs(vec<float> a, vec<float> b) { return {(__m512)_mm512_cvtne2ps_pbh(b.v, a.v)}; }
#endif

// One number as what it is computed in.
FC_INLINE float wide(float x) { return x; }
FC_INLINE double wide(double x) { return x; }

// The vocabulary of vec.h for memory of halves.
#define FC_HALF(S)                                                                                         \
  FC_INLINE vec<float> load(const S* p) { return widen<S>(load_halves(p)); }                               \
  FC_INLINE vec<float> load_range(const S* p, int lo, int hi) { return widen<S>(load_halves(p, lo, hi)); } \
  FC_INLINE vec<float> load(const S* p, int n) { return load_range(p, 0, n); }                             \
  FC_INLINE float wide(S x) { return load(&x, 1).v[0]; }                                                   \
  FC_INLINE void store(S* p, vec<float> a) { store_halves(p, narrow<S>(a)); }                              \
  FC_INLINE void store(S* p, vec<float> a, int n) { store_halves(p, narrow<S>(a), n); }                    \
  FC_INLINE vec<float> load_strided(const S* p, int64_t step, int n) {                                     \
    S lanes[kLanes<float>] = {};                                                                           \
    for (int i = 0; i < n && i < kLanes<float>; ++i) lanes[i] = p[i * step];                               \
    return load(lanes);                                                                                    \
  }                                                                                                        \
  FC_INLINE void store_strided(S* p, int64_t step, vec<float> a, int n) {                                  \
    S lanes[kLanes<float>];                                                                                \
    store(lanes, a);                                                                                       \
    for (int i = 0; i < n && i < kLanes<float>; ++i) p[i * step] = lanes[i];                               \
  }
FC_HALF(bf16)
FC_HALF(f16)
#undef FC_HALF

}  // namespace fastconv::FASTCONV_TARGET

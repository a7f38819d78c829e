// x86-64-v4: 64-byte vectors, comparisons and partial accesses through mask registers.
#pragma once

#include "cpu/simd/vec.h"

namespace fastconv::FASTCONV_TARGET {

template <class T>
struct mask;
template <>
struct mask<float> {
  __mmask16 m;
};
template <>
struct mask<double> {
  __mmask8 m;
};

// Lanes lo..hi-1 set; both clamped to 0..lanes. bzhi takes any count, so no branch.
template <class T>
FC_INLINE uint32_t lane_range(int lo, int hi) {
  lo = lo < 0 ? 0 : lo;
  hi = hi < 0 ? 0 : hi > kLanes<T> ? kLanes<T> : hi;
  return _bzhi_u32(~0u, unsigned(hi)) & ~_bzhi_u32(~0u, unsigned(lo));
}

FC_INLINE vec<float> load(const float* p) { return {_mm512_loadu_ps(p)}; }
FC_INLINE vec<double> load(const double* p) { return {_mm512_loadu_pd(p)}; }
FC_INLINE void store(float* p, vec<float> a) { _mm512_storeu_ps(p, a.v); }
FC_INLINE void store(double* p, vec<double> a) { _mm512_storeu_pd(p, a.v); }

// Lanes lo..hi-1 from p[lo..hi-1], zeros elsewhere; nothing outside is touched. lo and hi are clamped to 0..lanes.
FC_INLINE vec<float> load_range(const float* p, int lo, int hi) {
  return {_mm512_maskz_loadu_ps(__mmask16(lane_range<float>(lo, hi)), p)};
}
FC_INLINE vec<double> load_range(const double* p, int lo, int hi) {
  return {_mm512_maskz_loadu_pd(__mmask8(lane_range<double>(lo, hi)), p)};
}
template <class T>
FC_INLINE vec<T> load(const T* p, int n) {
  return load_range(p, 0, n);
}
FC_INLINE void store(float* p, vec<float> a, int n) { _mm512_mask_storeu_ps(p, __mmask16(lane_range<float>(0, n)), a.v); }
FC_INLINE void store(double* p, vec<double> a, int n) { _mm512_mask_storeu_pd(p, __mmask8(lane_range<double>(0, n)), a.v); }

// a*b + c in one rounding.
FC_INLINE vec<float> fma(vec<float> a, vec<float> b, vec<float> c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
FC_INLINE vec<double> fma(vec<double> a, vec<double> b, vec<double> c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }

FC_INLINE mask<float> greater(vec<float> a, vec<float> b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
FC_INLINE mask<double> greater(vec<double> a, vec<double> b) { return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_GT_OQ)}; }
FC_INLINE mask<float> is_nan(vec<float> a) { return {_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q)}; }
FC_INLINE mask<double> is_nan(vec<double> a) { return {_mm512_cmp_pd_mask(a.v, a.v, _CMP_UNORD_Q)}; }
FC_INLINE mask<float> operator|(mask<float> a, mask<float> b) { return {__mmask16(a.m | b.m)}; }
FC_INLINE mask<double> operator|(mask<double> a, mask<double> b) { return {__mmask8(a.m | b.m)}; }
// Where the mask is set a, elsewhere b.
FC_INLINE vec<float> blend(mask<float> m, vec<float> a, vec<float> b) { return {_mm512_mask_blend_ps(m.m, b.v, a.v)}; }
FC_INLINE vec<double> blend(mask<double> m, vec<double> a, vec<double> b) { return {_mm512_mask_blend_pd(m.m, b.v, a.v)}; }
FC_INLINE index_vec<float> blend(mask<float> m, index_vec<float> a, index_vec<float> b) {
  return {(index_vec<float>::raw)_mm512_mask_blend_epi32(m.m, (__m512i)b.v, (__m512i)a.v)};
}
FC_INLINE index_vec<double> blend(mask<double> m, index_vec<double> a, index_vec<double> b) {
  return {(index_vec<double>::raw)_mm512_mask_blend_epi64(m.m, (__m512i)b.v, (__m512i)a.v)};
}
// The larger and the smaller of each lane; where one is NaN the result is b, as in x86.
FC_INLINE vec<float> max(vec<float> a, vec<float> b) { return {_mm512_max_ps(a.v, b.v)}; }
FC_INLINE vec<double> max(vec<double> a, vec<double> b) { return {_mm512_max_pd(a.v, b.v)}; }
FC_INLINE vec<float> min(vec<float> a, vec<float> b) { return {_mm512_min_ps(a.v, b.v)}; }
FC_INLINE vec<double> min(vec<double> a, vec<double> b) { return {_mm512_min_pd(a.v, b.v)}; }
FC_INLINE vec<float> sqrt(vec<float> a) { return {_mm512_sqrt_ps(a.v)}; }
FC_INLINE vec<double> sqrt(vec<double> a) { return {_mm512_sqrt_pd(a.v)}; }
// Nearest integer, ties to even.
FC_INLINE vec<float> round(vec<float> a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
FC_INLINE vec<double> round(vec<double> a) { return {_mm512_roundscale_pd(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// a * 2^n for an integral n, rounded once. The other instruction sets have no such instruction.
FC_INLINE vec<float> scale(vec<float> a, vec<float> n) { return {_mm512_scalef_ps(a.v, n.v)}; }
FC_INLINE vec<double> scale(vec<double> a, vec<double> n) { return {_mm512_scalef_pd(a.v, n.v)}; }
FC_INLINE vec<float> abs(vec<float> a) { return {_mm512_abs_ps(a.v)}; }
FC_INLINE vec<double> abs(vec<double> a) { return {_mm512_abs_pd(a.v)}; }

// rows[i] lane j becomes rows[j] lane i: 64 shuffles for 256 floats.
FC_INLINE void transpose(vec<float> (&rows)[16]) {
  __m512 pair[16], quad[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    pair[i] = _mm512_unpacklo_ps(rows[i].v, rows[i + 1].v);
    pair[i + 1] = _mm512_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    quad[i] = _mm512_shuffle_ps(pair[i], pair[i + 2], 0x44);
    quad[i + 1] = _mm512_shuffle_ps(pair[i], pair[i + 2], 0xee);
    quad[i + 2] = _mm512_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
    quad[i + 3] = _mm512_shuffle_ps(pair[i + 1], pair[i + 3], 0xee);
  }
  // quad[4*b + j] holds, in its 128-bit lane l, column 4*l + j of rows 4*b .. 4*b+3.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 low = _mm512_shuffle_f32x4(quad[j], quad[4 + j], 0x88),
                 high = _mm512_shuffle_f32x4(quad[8 + j], quad[12 + j], 0x88);
    const __m512 low_odd = _mm512_shuffle_f32x4(quad[j], quad[4 + j], 0xdd);
    const __m512 high_odd = _mm512_shuffle_f32x4(quad[8 + j], quad[12 + j], 0xdd);
    rows[j].v = _mm512_shuffle_f32x4(low, high, 0x88);
    rows[8 + j].v = _mm512_shuffle_f32x4(low, high, 0xdd);
    rows[4 + j].v = _mm512_shuffle_f32x4(low_odd, high_odd, 0x88);
    rows[12 + j].v = _mm512_shuffle_f32x4(low_odd, high_odd, 0xdd);
  }
}
FC_INLINE void transpose(vec<double> (&rows)[8]) {
  __m512d pair[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    pair[i] = _mm512_unpacklo_pd(rows[i].v, rows[i + 1].v);
    pair[i + 1] = _mm512_unpackhi_pd(rows[i].v, rows[i + 1].v);
  }
  // pair[2*b + j] holds, in its 128-bit lane l, column 2*l + j of rows 2*b, 2*b+1.
#pragma GCC unroll 2
  for (int j = 0; j < 2; ++j) {
    const __m512d low = _mm512_shuffle_f64x2(pair[j], pair[2 + j], 0x88),
                  high = _mm512_shuffle_f64x2(pair[4 + j], pair[6 + j], 0x88);
    const __m512d low_odd = _mm512_shuffle_f64x2(pair[j], pair[2 + j], 0xdd);
    const __m512d high_odd = _mm512_shuffle_f64x2(pair[4 + j], pair[6 + j], 0xdd);
    rows[j].v = _mm512_shuffle_f64x2(low, high, 0x88);
    rows[4 + j].v = _mm512_shuffle_f64x2(low, high, 0xdd);
    rows[2 + j].v = _mm512_shuffle_f64x2(low_odd, high_odd, 0x88);
    rows[6 + j].v = _mm512_shuffle_f64x2(low_odd, high_odd, 0xdd);
  }
}

// Lanes 0..n-1 set, n at most the number of lanes.
template <class T>
FC_INLINE mask<T> first_lanes(int n) {
  return {decltype(mask<T>::m)(lane_range<T>(0, n))};
}

// torch's indices are int64 whatever T is: widened here, the first n lanes.
FC_INLINE void store_indices(int64_t* p, index_vec<float> a, int n) {
  const __m512i v = (__m512i)a.v;
  _mm512_mask_storeu_epi64(p, __mmask8(lane_range<double>(0, n)), _mm512_cvtepi32_epi64(_mm512_castsi512_si256(v)));
  _mm512_mask_storeu_epi64(p + 8, __mmask8(lane_range<double>(0, n - 8)), _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(v, 1)));
}
FC_INLINE void store_indices(int64_t* p, index_vec<double> a, int n) {
  _mm512_mask_storeu_epi64(p, __mmask8(lane_range<double>(0, n)), (__m512i)a.v);
}

// a and b are one sequence of 2 * lanes: its even and its odd places, and back.
FC_INLINE void deinterleave(vec<float> a, vec<float> b, vec<float>& even, vec<float>& odd) {
  const __m512i pick = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  even = {_mm512_permutex2var_ps(a.v, pick, b.v)};
  odd = {_mm512_permutex2var_ps(a.v, _mm512_add_epi32(pick, _mm512_set1_epi32(1)), b.v)};
}
FC_INLINE void deinterleave(vec<double> a, vec<double> b, vec<double>& even, vec<double>& odd) {
  const __m512i pick = _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14);
  even = {_mm512_permutex2var_pd(a.v, pick, b.v)};
  odd = {_mm512_permutex2var_pd(a.v, _mm512_add_epi64(pick, _mm512_set1_epi64(1)), b.v)};
}
FC_INLINE void interleave(vec<float> even, vec<float> odd, vec<float>& a, vec<float>& b) {
  const __m512i pick = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  a = {_mm512_permutex2var_ps(even.v, pick, odd.v)};
  b = {_mm512_permutex2var_ps(even.v, _mm512_add_epi32(pick, _mm512_set1_epi32(8)), odd.v)};
}
FC_INLINE void interleave(vec<double> even, vec<double> odd, vec<double>& a, vec<double>& b) {
  const __m512i pick = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
  a = {_mm512_permutex2var_pd(even.v, pick, odd.v)};
  b = {_mm512_permutex2var_pd(even.v, _mm512_add_epi64(pick, _mm512_set1_epi64(4)), odd.v)};
}

// Lane i becomes lane pick[i].
FC_INLINE vec<float> permute(vec<float> a, index_vec<float> pick) { return {_mm512_permutexvar_ps((__m512i)pick.v, a.v)}; }
FC_INLINE vec<double> permute(vec<double> a, index_vec<double> pick) { return {_mm512_permutexvar_pd((__m512i)pick.v, a.v)}; }

// The first n of lanes 0, 2, 4, ... to their places; what lies between is not touched.
FC_INLINE void store_even(float* p, vec<float> a, int n) {
  _mm512_mask_storeu_ps(p, __mmask16(lane_range<float>(0, 2 * n) & 0x5555), a.v);
}
FC_INLINE void store_even(double* p, vec<double> a, int n) {
  _mm512_mask_storeu_pd(p, __mmask8(lane_range<double>(0, 2 * n) & 0x55), a.v);
}

// The sum of all lanes, as a binary tree.
FC_INLINE float reduce_add(vec<float> a) { return _mm512_reduce_add_ps(a.v); }
FC_INLINE double reduce_add(vec<double> a) { return _mm512_reduce_add_pd(a.v); }

// The largest lane.
FC_INLINE float reduce_max(vec<float> a) { return _mm512_reduce_max_ps(a.v); }
FC_INLINE double reduce_max(vec<double> a) { return _mm512_reduce_max_pd(a.v); }

}  // namespace fastconv::FASTCONV_TARGET

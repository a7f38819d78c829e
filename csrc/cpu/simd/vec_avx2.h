// x86-64-v3: 32-byte vectors, FMA. Partial accesses go through vmaskmov, which touches nothing outside the mask.
#pragma once

#include "cpu/simd/vec.h"

namespace fastconv::FASTCONV_TARGET {

template <class T>
struct mask {
  typename index_vec<T>::raw m;  // all ones or all zeros in each lane
};

// Lanes lo..hi-1 set.
template <class T>
FC_INLINE __m256i lane_range(int lo, int hi) {
  if constexpr (sizeof(T) == 4) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(lo), lane), _mm256_cmpgt_epi32(_mm256_set1_epi32(hi), lane));
  } else {
    const __m256i lane = _mm256_setr_epi64x(0, 1, 2, 3);
    return _mm256_andnot_si256(_mm256_cmpgt_epi64(_mm256_set1_epi64x(lo), lane),
                               _mm256_cmpgt_epi64(_mm256_set1_epi64x(hi), lane));
  }
}

FC_INLINE vec<float> load(const float* p) { return {_mm256_loadu_ps(p)}; }
FC_INLINE vec<double> load(const double* p) { return {_mm256_loadu_pd(p)}; }
FC_INLINE void store(float* p, vec<float> a) { _mm256_storeu_ps(p, a.v); }
FC_INLINE void store(double* p, vec<double> a) { _mm256_storeu_pd(p, a.v); }

// Lanes lo..hi-1 from p[lo..hi-1], zeros elsewhere; nothing outside is touched. lo and hi are clamped to 0..lanes.
FC_INLINE vec<float> load_range(const float* p, int lo, int hi) { return {_mm256_maskload_ps(p, lane_range<float>(lo, hi))}; }
FC_INLINE vec<double> load_range(const double* p, int lo, int hi) { return {_mm256_maskload_pd(p, lane_range<double>(lo, hi))}; }
template <class T>
FC_INLINE vec<T> load(const T* p, int n) {
  return load_range(p, 0, n);
}
FC_INLINE void store(float* p, vec<float> a, int n) { _mm256_maskstore_ps(p, lane_range<float>(0, n), a.v); }
FC_INLINE void store(double* p, vec<double> a, int n) { _mm256_maskstore_pd(p, lane_range<double>(0, n), a.v); }

// a*b + c in one rounding.
FC_INLINE vec<float> fma(vec<float> a, vec<float> b, vec<float> c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
FC_INLINE vec<double> fma(vec<double> a, vec<double> b, vec<double> c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }

template <class T>
FC_INLINE mask<T> greater(vec<T> a, vec<T> b) {
  return {a.v > b.v};
}
template <class T>
FC_INLINE mask<T> is_nan(vec<T> a) {
  return {a.v != a.v};
}
template <class T>
FC_INLINE mask<T> operator|(mask<T> a, mask<T> b) {
  return {a.m | b.m};
}
// Where the mask is set a, elsewhere b.
template <class T>
FC_INLINE vec<T> blend(mask<T> m, vec<T> a, vec<T> b) {
  return {m.m ? a.v : b.v};
}
template <class T>
FC_INLINE index_vec<T> blend(mask<T> m, index_vec<T> a, index_vec<T> b) {
  return {m.m ? a.v : b.v};
}
// The larger and the smaller of each lane; where one is NaN the result is b, as in x86.
FC_INLINE vec<float> max(vec<float> a, vec<float> b) { return {_mm256_max_ps(a.v, b.v)}; }
FC_INLINE vec<double> max(vec<double> a, vec<double> b) { return {_mm256_max_pd(a.v, b.v)}; }
FC_INLINE vec<float> min(vec<float> a, vec<float> b) { return {_mm256_min_ps(a.v, b.v)}; }
FC_INLINE vec<double> min(vec<double> a, vec<double> b) { return {_mm256_min_pd(a.v, b.v)}; }
FC_INLINE vec<float> sqrt(vec<float> a) { return {_mm256_sqrt_ps(a.v)}; }
FC_INLINE vec<double> sqrt(vec<double> a) { return {_mm256_sqrt_pd(a.v)}; }
// Nearest integer, ties to even.
FC_INLINE vec<float> round(vec<float> a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
FC_INLINE vec<double> round(vec<double> a) { return {_mm256_round_pd(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
FC_INLINE vec<float> abs(vec<float> a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
FC_INLINE vec<double> abs(vec<double> a) { return {_mm256_andnot_pd(_mm256_set1_pd(-0.0), a.v)}; }

// rows[i] lane j becomes rows[j] lane i.
FC_INLINE void transpose(vec<float> (&rows)[8]) {
  __m256 pair[8], quad[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    pair[i] = _mm256_unpacklo_ps(rows[i].v, rows[i + 1].v);
    pair[i + 1] = _mm256_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    quad[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
    quad[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xee);
    quad[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
    quad[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    rows[i].v = _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x20);
    rows[i + 4].v = _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x31);
  }
}
FC_INLINE void transpose(vec<double> (&rows)[4]) {
  const __m256d pair[4] = {_mm256_unpacklo_pd(rows[0].v, rows[1].v), _mm256_unpackhi_pd(rows[0].v, rows[1].v),
                           _mm256_unpacklo_pd(rows[2].v, rows[3].v), _mm256_unpackhi_pd(rows[2].v, rows[3].v)};
  rows[0].v = _mm256_permute2f128_pd(pair[0], pair[2], 0x20);
  rows[1].v = _mm256_permute2f128_pd(pair[1], pair[3], 0x20);
  rows[2].v = _mm256_permute2f128_pd(pair[0], pair[2], 0x31);
  rows[3].v = _mm256_permute2f128_pd(pair[1], pair[3], 0x31);
}

// Lanes 0..n-1 set, n at most the number of lanes.
template <class T>
FC_INLINE mask<T> first_lanes(int n) {
  return {(typename index_vec<T>::raw)lane_range<T>(0, n)};
}

// torch's indices are int64 whatever T is: widened here, the first n lanes.
FC_INLINE void store_indices(int64_t* p, index_vec<double> a, int n) {
  _mm256_maskstore_epi64((long long*)p, lane_range<double>(0, n), (__m256i)a.v);
}
FC_INLINE void store_indices(int64_t* p, index_vec<float> a, int n) {
  const __m256i low = _mm256_cvtepi32_epi64(_mm256_castsi256_si128((__m256i)a.v));
  const __m256i high = _mm256_cvtepi32_epi64(_mm256_extracti128_si256((__m256i)a.v, 1));
  _mm256_maskstore_epi64((long long*)p, lane_range<double>(0, n), low);
  _mm256_maskstore_epi64((long long*)p + 4, lane_range<double>(0, n - 4), high);
}

// a and b are one sequence of 2 * lanes: its even and its odd places, and back.
FC_INLINE void deinterleave(vec<float> a, vec<float> b, vec<float>& even, vec<float>& odd) {
  const __m256d e = (__m256d)_mm256_shuffle_ps(a.v, b.v, _MM_SHUFFLE(2, 0, 2, 0));
  const __m256d o = (__m256d)_mm256_shuffle_ps(a.v, b.v, _MM_SHUFFLE(3, 1, 3, 1));
  even = {(__m256)_mm256_permute4x64_pd(e, _MM_SHUFFLE(3, 1, 2, 0))};
  odd = {(__m256)_mm256_permute4x64_pd(o, _MM_SHUFFLE(3, 1, 2, 0))};
}
FC_INLINE void deinterleave(vec<double> a, vec<double> b, vec<double>& even, vec<double>& odd) {
  even = {_mm256_permute4x64_pd(_mm256_unpacklo_pd(a.v, b.v), _MM_SHUFFLE(3, 1, 2, 0))};
  odd = {_mm256_permute4x64_pd(_mm256_unpackhi_pd(a.v, b.v), _MM_SHUFFLE(3, 1, 2, 0))};
}
FC_INLINE void interleave(vec<float> even, vec<float> odd, vec<float>& a, vec<float>& b) {
  const __m256 low = _mm256_unpacklo_ps(even.v, odd.v), high = _mm256_unpackhi_ps(even.v, odd.v);
  a = {_mm256_permute2f128_ps(low, high, 0x20)};
  b = {_mm256_permute2f128_ps(low, high, 0x31)};
}
FC_INLINE void interleave(vec<double> even, vec<double> odd, vec<double>& a, vec<double>& b) {
  const __m256d low = _mm256_unpacklo_pd(even.v, odd.v), high = _mm256_unpackhi_pd(even.v, odd.v);
  a = {_mm256_permute2f128_pd(low, high, 0x20)};
  b = {_mm256_permute2f128_pd(low, high, 0x31)};
}

// Lane i becomes lane pick[i].
FC_INLINE vec<float> permute(vec<float> a, index_vec<float> pick) { return {_mm256_permutevar8x32_ps(a.v, (__m256i)pick.v)}; }
FC_INLINE vec<double> permute(vec<double> a, index_vec<double> pick) {  // as pairs of 32 bits
  const __m256i low = _mm256_slli_epi64((__m256i)pick.v, 1);
  const __m256i high = _mm256_slli_epi64(_mm256_add_epi64(low, _mm256_set1_epi64x(1)), 32);
  return {(__m256d)_mm256_permutevar8x32_ps((__m256)a.v, _mm256_or_si256(low, high))};
}

// The first n of lanes 0, 2, 4, ... to their places; what lies between is not touched.
FC_INLINE void store_even(float* p, vec<float> a, int n) {
  const __m256i even = _mm256_setr_epi32(-1, 0, -1, 0, -1, 0, -1, 0);
  _mm256_maskstore_ps(p, _mm256_and_si256(even, lane_range<float>(0, 2 * n)), a.v);
}
FC_INLINE void store_even(double* p, vec<double> a, int n) {
  const __m256i even = _mm256_setr_epi64x(-1, 0, -1, 0);
  _mm256_maskstore_pd(p, _mm256_and_si256(even, lane_range<double>(0, 2 * n)), a.v);
}

// The sum of all lanes, as a binary tree.
FC_INLINE double reduce_add(vec<double> a) {
  const __m128d half = _mm_add_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(half, _mm_unpackhi_pd(half, half)));
}
FC_INLINE float reduce_add(vec<float> a) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}

// The largest lane.
FC_INLINE double reduce_max(vec<double> a) {
  const __m128d half = _mm_max_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
  return _mm_cvtsd_f64(_mm_max_sd(half, _mm_unpackhi_pd(half, half)));
}
FC_INLINE float reduce_max(vec<float> a) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_shuffle_ps(half, half, 1)));
}

}  // namespace fastconv::FASTCONV_TARGET

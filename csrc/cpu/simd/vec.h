// The vector vocabulary. Everything below cpu/ is compiled once for each ISA, in namespace fastconv::<isa>, and sees the ISA only
// through this file: vec<T> is one register of T, mask<T> the result of a comparison, index_vec<T> as many integers as vec<T> has
// lanes. The operations are the same for every ISA; vec_scalar.h, vec_avx2.h and vec_avx512.h hold the few that need intrinsics.
//
// Hygiene: no STL, no inline function outside namespace fastconv::<isa>. An inline of std:: emitted by the AVX-512 object could
// be the copy that the linker keeps for everyone, and then crashes older CPUs (numpy #25274): tools/check_isa_objects.py checks.
#pragma once

#include <cstddef>
#include <cstdint>

#ifndef FASTCONV_TARGET
#error "compile with -DFASTCONV_TARGET=scalar|avx2|avx512|avx512_bf16; cmake/isa.cmake does"
#endif

#define FC_TARGET_scalar 0
#define FC_TARGET_avx2 1
#define FC_TARGET_avx512 2
#define FC_TARGET_avx512_bf16 2  // the same vectors, and products of pairs of bf16: cpu/simd/half.h
#define FC_CONCAT_(a, b) a##b
#define FC_CONCAT(a, b) FC_CONCAT_(a, b)
#define FC_TARGET_LEVEL FC_CONCAT(FC_TARGET_, FASTCONV_TARGET)

#define FC_INLINE inline __attribute__((always_inline))

#if FC_TARGET_LEVEL > 0
#include <immintrin.h>
#endif

namespace fastconv::FASTCONV_TARGET {

inline constexpr int kVectorBytes = FC_TARGET_LEVEL == 2 ? 64 : FC_TARGET_LEVEL == 1 ? 32 : 16;
// Architectural vector registers: the budget of every tile.
inline constexpr int kVectorRegisters = FC_TARGET_LEVEL == 2 ? 32 : 16;

template <class T>
inline constexpr int kLanes = kVectorBytes / int(sizeof(T));

// Integers of the width of T: indices for pooling, bit patterns for exp.
template <class T>
struct int_of;
template <>
struct int_of<float> {
  using type = int32_t;
};
template <>
struct int_of<double> {
  using type = int64_t;
};

template <class T>
struct vec {
  using Int = typename int_of<T>::type;
  static constexpr int lanes = kLanes<T>;
  typedef T raw __attribute__((vector_size(kVectorBytes)));
  raw v;
};

template <class T>
struct index_vec {
  using Int = typename int_of<T>::type;
  static constexpr int lanes = kLanes<T>;
  typedef Int raw __attribute__((vector_size(kVectorBytes)));
  raw v;
};

// --- arithmetic: the compiler's own vector types, the same for all ISAs

template <class T>
FC_INLINE vec<T> zero() {
  return {typename vec<T>::raw{}};
}
// x - 0 and not 0 + x: the compiler may drop the first, but not the second, which turns -0 into +0.
template <class T>
FC_INLINE vec<T> set1(T x) {
  return {x - typename vec<T>::raw{}};
}
template <class T>
FC_INLINE vec<T> operator+(vec<T> a, vec<T> b) {
  return {a.v + b.v};
}
template <class T>
FC_INLINE vec<T> operator-(vec<T> a, vec<T> b) {
  return {a.v - b.v};
}
template <class T>
FC_INLINE vec<T> operator*(vec<T> a, vec<T> b) {
  return {a.v * b.v};
}
template <class T>
FC_INLINE vec<T> operator/(vec<T> a, vec<T> b) {
  return {a.v / b.v};
}
template <class T>
FC_INLINE index_vec<T> index_set1(typename int_of<T>::type x) {
  return {typename index_vec<T>::raw{} + x};
}
template <class T>
FC_INLINE index_vec<T> operator+(index_vec<T> a, index_vec<T> b) {
  return {a.v + b.v};
}
template <class T>
FC_INLINE index_vec<T> operator*(index_vec<T> a, index_vec<T> b) {
  return {a.v * b.v};
}
// 0, 1, 2, ...
template <class T>
FC_INLINE index_vec<T> index_iota() {
  index_vec<T> r{};
  for (int i = 0; i < kLanes<T>; ++i) r.v[i] = i;
  return r;
}
template <class T>
FC_INLINE index_vec<T> index_load(const typename int_of<T>::type* p) {
  index_vec<T> r;
  __builtin_memcpy(&r.v, p, sizeof r.v);
  return r;
}
template <class T>
FC_INLINE void index_store(typename int_of<T>::type* p, index_vec<T> a) {
  __builtin_memcpy(p, &a.v, sizeof a.v);
}

}  // namespace fastconv::FASTCONV_TARGET

#if FC_TARGET_LEVEL == 2
#include "cpu/simd/vec_avx512.h"
#elif FC_TARGET_LEVEL == 1
#include "cpu/simd/vec_avx2.h"
#else
#include "cpu/simd/vec_scalar.h"
#endif

namespace fastconv::FASTCONV_TARGET {

// A whole vector, or the first n lanes and zeros; n is a constant where it is lanes.
template <class T>
FC_INLINE vec<T> load_some(const T* p, int n) {
  return n == kLanes<T> ? load(p) : load(p, n);
}
template <class T>
FC_INLINE void store_some(T* p, vec<T> a, int n) {
  if (n == kLanes<T>) {
    store(p, a);
  } else {
    store(p, a, n);
  }
}

// The first n lanes of the strided sequence p[0], p[step], ...; the other lanes are zero. n may be anything: it is clamped.
template <class T>
FC_INLINE vec<T> load_strided(const T* p, int64_t step, int n) {
  if (step == 2) {
    vec<T> even, odd;
    deinterleave(load_range(p, 0, 2 * n - 1), load_range(p + kLanes<T>, 0, 2 * n - 1 - kLanes<T>), even, odd);
    return even;
  }
  vec<T> r = zero<T>();
  for (int i = 0; i < kLanes<T> && i < n; ++i) r.v[i] = p[i * step];
  return r;
}
template <class T>
FC_INLINE void store_strided(T* p, int64_t step, vec<T> a, int n) {
  if (step == 2) {  // one phase of an input gradient of stride 2: two stores instead of sixteen
    vec<T> low, high;
    interleave(a, a, low, high);
    store_even(p, low, n);
    return store_even(p + kLanes<T>, high, n - kLanes<T> / 2);
  }
  for (int i = 0; i < kLanes<T> && i < n; ++i) p[i * step] = a.v[i];
}

}  // namespace fastconv::FASTCONV_TARGET

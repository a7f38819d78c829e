// The baseline: 16-byte vectors in the compiler's own notation, no intrinsics. Any architecture that g++ or clang knows runs it.
#pragma once

#include "cpu/simd/vec.h"

namespace fastconv::FASTCONV_TARGET {

template <class T>
struct mask {
  typename index_vec<T>::raw m;
};

template <class T>
FC_INLINE vec<T> load(const T* p) {
  vec<T> r;
  __builtin_memcpy(&r.v, p, sizeof r.v);
  return r;
}
template <class T>
FC_INLINE void store(T* p, vec<T> a) {
  __builtin_memcpy(p, &a.v, sizeof a.v);
}
// Lanes lo..hi-1 from p[lo..hi-1], zeros elsewhere; nothing outside is touched. lo and hi are clamped to 0..lanes.
template <class T>
FC_INLINE vec<T> load_range(const T* p, int lo, int hi) {
  vec<T> r = zero<T>();
  for (int i = lo < 0 ? 0 : lo; i < hi && i < kLanes<T>; ++i) r.v[i] = p[i];
  return r;
}
template <class T>
FC_INLINE vec<T> load(const T* p, int n) {
  return load_range(p, 0, n);
}
template <class T>
FC_INLINE void store(T* p, vec<T> a, int n) {
  for (int i = 0; i < n && i < kLanes<T>; ++i) p[i] = a.v[i];
}

// a*b + c. The baseline has no fused instruction, and a call to fma() would be a hundred times slower than two roundings.
template <class T>
FC_INLINE vec<T> fma(vec<T> a, vec<T> b, vec<T> c) {
  return {a.v * b.v + c.v};
}
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
template <class T>
FC_INLINE vec<T> max(vec<T> a, vec<T> b) {
  return {a.v > b.v ? a.v : b.v};
}
template <class T>
FC_INLINE vec<T> min(vec<T> a, vec<T> b) {
  return {a.v < b.v ? a.v : b.v};
}
template <class T>
FC_INLINE vec<T> sqrt(vec<T> a) {
  for (int i = 0; i < kLanes<T>; ++i) {
    if constexpr (sizeof(T) == 4) {
      a.v[i] = __builtin_sqrtf(a.v[i]);
    } else {
      a.v[i] = __builtin_sqrt(a.v[i]);
    }
  }
  return a;
}
// Nearest integer, ties to even, for |a| below 2^22 (float) or 2^51 (double).
template <class T>
FC_INLINE vec<T> round(vec<T> a) {
  constexpr T kMagic = sizeof(T) == 4 ? T(12582912.0) : T(6755399441055744.0);  // 1.5 * 2^23, 1.5 * 2^52
  vec<T> shifted = a + set1(kMagic);
  return shifted - set1(kMagic);
}
template <class T>
FC_INLINE vec<T> abs(vec<T> a) {
  return max(a, zero<T>() - a);
}

// rows[i] lane j becomes rows[j] lane i.
template <class T>
FC_INLINE void transpose(vec<T> (&rows)[kLanes<T>]) {
  for (int i = 0; i < kLanes<T>; ++i) {
    for (int j = 0; j < i; ++j) {
      const T upper = rows[j].v[i];
      rows[j].v[i] = rows[i].v[j];
      rows[i].v[j] = upper;
    }
  }
}

// Lanes 0..n-1 set, n at most the number of lanes.
template <class T>
FC_INLINE mask<T> first_lanes(int n) {
  mask<T> r;
  for (int i = 0; i < kLanes<T>; ++i) r.m[i] = i < n ? -1 : 0;
  return r;
}

// torch's indices are int64 whatever T is: widened here, the first n lanes.
template <class T>
FC_INLINE void store_indices(int64_t* p, index_vec<T> a, int n) {
  for (int i = 0; i < n && i < kLanes<T>; ++i) p[i] = a.v[i];
}

// a and b are one sequence of 2 * lanes: its even and its odd places, and back.
template <class T>
FC_INLINE void deinterleave(vec<T> a, vec<T> b, vec<T>& even, vec<T>& odd) {
  constexpr int kHalf = kLanes<T> / 2;
  vec<T> e, o;
  for (int i = 0; i < kHalf; ++i) {
    e.v[i] = a.v[2 * i];
    e.v[i + kHalf] = b.v[2 * i];
    o.v[i] = a.v[2 * i + 1];
    o.v[i + kHalf] = b.v[2 * i + 1];
  }
  even = e;
  odd = o;
}
template <class T>
FC_INLINE void interleave(vec<T> even, vec<T> odd, vec<T>& a, vec<T>& b) {
  constexpr int kHalf = kLanes<T> / 2;
  for (int i = 0; i < kHalf; ++i) {
    a.v[2 * i] = even.v[i];
    a.v[2 * i + 1] = odd.v[i];
    b.v[2 * i] = even.v[i + kHalf];
    b.v[2 * i + 1] = odd.v[i + kHalf];
  }
}

// Lane i becomes lane pick[i].
template <class T>
FC_INLINE vec<T> permute(vec<T> a, index_vec<T> pick) {
  vec<T> r;
  for (int i = 0; i < kLanes<T>; ++i) r.v[i] = a.v[pick.v[i]];
  return r;
}

// The first n of lanes 0, 2, 4, ... to their places; what lies between is not touched.
template <class T>
FC_INLINE void store_even(T* p, vec<T> a, int n) {
  for (int i = 0; 2 * i < kLanes<T> && i < n; ++i) p[2 * i] = a.v[2 * i];
}

// The sum of all lanes, as a binary tree.
template <class T>
FC_INLINE T reduce_add(vec<T> a) {
  for (int half = kLanes<T> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) a.v[i] += a.v[i + half];
  }
  return a.v[0];
}

// The largest lane.
template <class T>
FC_INLINE T reduce_max(vec<T> a) {
  T largest = a.v[0];
  for (int i = 1; i < kLanes<T>; ++i) largest = a.v[i] > largest ? a.v[i] : largest;
  return largest;
}

}  // namespace fastconv::FASTCONV_TARGET

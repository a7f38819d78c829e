// The activations of an epilogue, on one vector in registers. Infinities and NaN give what torch gives.
//
// TABLE
#pragma once

#include "core/problem.h"
#include "cpu/blocks/exp.h"

namespace fastconv::FASTCONV_TARGET {

// max and min return their second operand on NaN, so x comes second wherever NaN has to pass.
template <class T>
FC_INLINE vec<T> clamp(vec<T> x, T low, T high) {
  return min(set1(high), max(set1(low), x));
}

// numerator / (1 + exp(-x)) through exp(-|x|), which cannot overflow: for x < 0 both sides are multiplied by exp(x), so that
// the result keeps its relative accuracy down to the denormals.
template <class T>
FC_INLINE vec<T> times_sigmoid(vec<T> numerator, vec<T> x) {
  const vec<T> e = exp(zero<T>() - abs(x));
  return blend(greater(zero<T>(), x), numerator * e, numerator) / (set1(T(1)) + e);
}

// The probability that a standard normal variable is below -a, for a >= 0.
//
// exp(-a^2/2) * R(a), where R(a) * (a + 4) is a polynomial in t = (a - 4) / (a + 4); interpolated at Chebyshev points the
// relative error is 2.9e-9 for degree 10 and 3.8e-17 for degree 22. Rounding a^2/2 would cost a^2/4 units of the last place:
// the square is taken of the leading half of a's bits, which is exact, and the rest goes into exp's tail.
template <class T>
FC_INLINE vec<T> normal_tail(vec<T> a) {
  constexpr T kZeroFrom = sizeof(T) == 4 ? T(15) : T(40);  // the result is 0 from here on
  a = min(set1(kZeroFrom), a);
  constexpr int kDropped = FloatFormat<T>::mantissa_bits / 2 + 1;
  using Bits = typename index_vec<T>::raw;
  const vec<T> lead = {(typename vec<T>::raw)((Bits)a.v & (index_set1<T>(-1).v << kDropped))};
  const vec<T> minus_half = set1(T(-0.5));
  const vec<T> e = exp(lead * lead * minus_half, (a - lead) * (a + lead) * minus_half);
  const vec<T> q = set1(T(1)) / (a + set1(T(4)));
  const vec<T> t = fma(set1(T(-8)), q, set1(T(1)));
  vec<T> f;
  if constexpr (sizeof(T) == 4) {
    f = polynomial(t, 0.755285130623010682, -0.607896659090852187, 0.387137367998559901, -0.186521281402521288, 0.0603975330878292214,
                   -0.00754526826571504971, -0.00348931727611505639, 0.00164521929735963592, 0.000171054611586862576,
                   -0.000231798678342340699, -5.15565932985614122e-5);
  } else {
    f = polynomial(t, 0.755285130415751478, -0.607896641971891764, 0.387137400742219335, -0.186521857959693392, 0.0603965748906766544,
                   -0.00754018896562501684, -0.00347969236180405956, 0.00163081844248058856, 0.000133344249783584282,
                   -0.00023109482414997104, -1.90784340592487053e-6, 3.51442149682578036e-5, 7.14930832547840089e-7,
                   -5.91901318615404412e-6, -6.24990699536978521e-7, 1.02007133925684645e-6, 2.63543105606844541e-7,
                   -1.54619681912219187e-7, -7.63471284344108608e-8, 1.48423900727513431e-8, 1.39765281559508218e-8,
                   -1.01529571764961797e-11, -9.990624160023276e-10);
  }
  return e * (f * q);
}

// x * normal_cdf(x); for x > 0 by the complement, so that neither side loses digits.
template <class T>
FC_INLINE vec<T> gelu(vec<T> x) {
  const vec<T> a = abs(x);
  const vec<T> tail = normal_tail(a);
  const vec<T> finite = min(set1(T(40)), a);  // inf * 0 would spoil gelu(inf) = inf
  return blend(greater(x, zero<T>()), x - finite * tail, x * tail);
}

template <class T>
FC_INLINE vec<T> activate(Activation activation, vec<T> x) {
  switch (activation) {
    case Activation::none:
      break;
    case Activation::relu:
      return max(zero<T>(), x);
    case Activation::relu6:
      return clamp(x, T(0), T(6));
    case Activation::silu:
      return times_sigmoid(x, x);
    case Activation::hardswish:
      return x * (clamp(x + set1(T(3)), T(0), T(6)) * set1(T(1) / T(6)));
    case Activation::gelu:
      return gelu(x);
    case Activation::sigmoid:
      return times_sigmoid(set1(T(1)), x);
  }
  return x;
}

}  // namespace fastconv::FASTCONV_TARGET

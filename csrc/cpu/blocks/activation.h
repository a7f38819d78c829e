// The activations of an epilogue, on one vector in registers. Infinities and NaN give what torch gives.
//
// Worst error measured, in units of the last place of the result, float (every 7th number up to 110 in magnitude) and double
// (2 million points to 750; gelu 18 thousand), the largest of the three ISAs: relu, relu6 0; sigmoid 2.4, 2.3; silu 3.4, 2.8;
// hardswish 2.5, 2.5; tanh 2.7, 2.9; gelu 5.9, 4.9; gelu_tanh 2.9, 2.8 down to x = -1. Where exp(-|x|) is denormal, silu's error
// is |x| / 2 denormal steps (1e-43 in float). Below -1 gelu_tanh's is 2.7 * (1 + |2u|), which is what rounding 2u does to
// exp(2u): 14 at -3, 34 at -5 (4e-6 of the result), where torch's own form is off by 30 %.
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

template <class T>
FC_INLINE vec<T> sigmoid(vec<T> x) {
  return times_sigmoid(set1(T(1)), x);
}

// -m / (2 + m) with m = exp(-2|x|) - 1 = 2^n * exp(r) - 1, where 1 + r*slope is taken apart so that a small x keeps its digits.
template <class T>
FC_INLINE vec<T> tanh(vec<T> x) {
  constexpr T kOneFrom = sizeof(T) == 4 ? T(10) : T(20);  // the result is 1 from here on
  const ExpArgument<T> argument(set1(T(-2)) * min(set1(kOneFrom), abs(x)));
  const vec<T> power = exp2_integral(argument.n);
  const vec<T> m = fma(power, argument.r * argument.slope(), power - set1(T(1)));
  const vec<T> t = m / (set1(T(2)) + m);
  return blend(greater(x, zero<T>()), zero<T>() - t, t);
}

// The probability that a standard normal variable is below -a, for a >= 0.
//
// exp(-a^2/2) * R(a), where R(a) * (a + 2) is a polynomial in t = (a - 2) / (a + 2); interpolated at Chebyshev points the
// relative error is 3.7e-9 for degree 11 and 7.5e-17 for degree 27. (With 4 in place of 2 degrees 10 and 22 do, but an error in
// the division counts 3.2 times instead of 1.6.) Rounding a^2/2 would cost a^2/4 units of the last place: the square is taken of
// the leading half of a's bits, which is exact, and the rest goes into exp's tail.
template <class T>
FC_INLINE vec<T> normal_tail(vec<T> a) {
  constexpr T kZeroFrom = sizeof(T) == 4 ? T(15) : T(40);  // the result is 0 from here on
  a = min(set1(kZeroFrom), a);
  constexpr int kDropped = FloatFormat<T>::mantissa_bits / 2 + 1;
  using Bits = typename index_vec<T>::raw;
  const vec<T> lead = {(typename vec<T>::raw)((Bits)a.v & (index_set1<T>(-1).v << kDropped))};
  const vec<T> minus_half = set1(T(-0.5));
  const vec<T> e = exp(lead * lead * minus_half, (a - lead) * (a + lead) * minus_half);
  const vec<T> q = set1(T(1)) / (a + set1(T(2)));
  const vec<T> t = fma(set1(T(-4)), q, set1(T(1)));
  vec<T> f;
  if constexpr (sizeof(T) == 4) {
    f = polynomial(t, 0.672408004810259266, -0.3314044756353548, 0.0287973751937974147, 0.0367194145142567047,
                   -0.000469769906423906569, -0.00673461613310575093, -0.00195161156823265936, 0.000823786080485037565,
                   0.000836916943058444525, 0.000133026019890146404, -0.000149598063010933673, -0.0000658198262181627648);
  } else {
    f = polynomial(t, 0.67240800489268242, -0.331404442388780093, 0.0287973603453639122, 0.0367183609687866106,
                   -0.000469596834486312837, -0.00672490707237149319, -0.00195112415736218121, 0.000785118041656785209,
                   0.000827198876071040779, 0.000206993015687418765, -0.00011569185675561354, -0.000128560848772743198,
                   -0.0000460631525229117685, 9.7226856074053504e-6, 0.000021745408912076039, 0.0000124418700659199166,
                   1.89521482138487243e-6, -2.57204546186286983e-6, -2.66696158735211904e-6, -1.78245697503363024e-6,
                   -6.24389410940153575e-7, 7.38280890112074903e-7, 1.00329013984493173e-6, 1.41561769663083664e-7,
                   -3.40563396714608562e-7, -1.33483394002228133e-7, 4.00865957488206454e-8, 2.20703557353465223e-8);
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

// x * (1 + tanh(u)) / 2 with u = sqrt(2/pi) * (x + 0.044715 * x^3). (1 + tanh(u)) / 2 is the sigmoid of 2u, which for negative x
// keeps the digits that 1 + tanh(u) loses.
template <class T>
FC_INLINE vec<T> gelu_tanh(vec<T> x) {
  const vec<T> slope = fma(x * x, set1(T(0.071354816272600249)), set1(T(1.5957691216057308)));
  return times_sigmoid(x, x * slope);
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
    case Activation::gelu_tanh:
      return gelu_tanh(x);
    case Activation::sigmoid:
      return times_sigmoid(set1(T(1)), x);
  }
  return x;
}

}  // namespace fastconv::FASTCONV_TARGET

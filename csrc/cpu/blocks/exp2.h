// exp2 for attention weights: s * factor - base = n + r with |r| <= 1/2, a polynomial for 2^r, and n put into the exponent.
//
// blocks/exp.h spends half of its operations on what a weight never needs: an argument in two parts (a score is already
// rounded), denormal results and overflow. With an integral base, rounding to n is one FMA and r another, and 13 operations
// remain for a vector: a tenth of the time of the products at 64 features (AVX-512).
//
// Relative error of the polynomial with 2^0 = 1 fixed: 9.1e-8 for degree 5 (float, minimax), 8.4e-18 for degree 11 (double,
// interpolated at Chebyshev points).
#pragma once

#include "cpu/blocks/exp.h"

namespace fastconv::FASTCONV_TARGET {

template <class T>
class Exp2 {
  using Format = FloatFormat<T>;
  static constexpr T kMagic = Format::shifter + Format::bias;  // adding it rounds, and leaves n + bias in the low bits

 public:
  // Whether this many doublings fit: beyond, adding to the magic number would shift its exponent.
  static FC_INLINE bool fits(T base) { return base < T(1 << 20) && base > -T(1 << 20); }

  // `base` is integral and fits, `factor` is positive, normal and far from the smallest number, `inverse` is 1 / factor.
  FC_INLINE Exp2(vec<T> factor, vec<T> inverse, vec<T> base)
      : factor_(factor), shift_(set1(kMagic) - base), lowest_((base - set1(T(Format::bias))) * inverse) {}

  // 2^(s * factor - base), 0 where that is below 2^(1 - bias). s = -inf gives 0, NaN gives NaN; the result must not overflow.
  FC_INLINE vec<T> operator()(vec<T> s) const {
    using Bits = typename index_vec<T>::raw;
    s = max(lowest_, s);  // in this order NaN passes; the exponent of what is clamped comes out as that of 0
    const vec<T> shifted = fma(s, factor_, shift_);
    const vec<T> r = fma(s, factor_, shift_ - shifted);
    vec<T> e;
    if constexpr (sizeof(T) == 4) {
      e = polynomial(r, 1.0, 0.693146978, 0.240222421, 0.0555073374, 0.00967151264, 0.00132647272);
    } else {
      e = polynomial(r, 1.0, 0.69314718055994530942, 0.2402265069591009822, 0.055504108664821594339, 0.0096181291076068885273,
                     0.001333355814641693531, 0.00015403530441736050155, 0.000015252733829836118394, 1.3215442587921689653e-6,
                     1.0178062445845773521e-7, 7.0725859692492236999e-9, 4.4549605981865183938e-10);
    }
    return e * vec<T>{(typename vec<T>::raw)((Bits)shifted.v << Format::mantissa_bits)};
  }

 private:
  vec<T> factor_, shift_, lowest_;
};

// 2^x for x <= 0 of any size, -inf and NaN included.
template <class T>
FC_INLINE vec<T> exp2_weight(vec<T> x) {
  return Exp2<T>(set1(T(1)), set1(T(1)), zero<T>())(x);
}
template <class T>
FC_INLINE T exp2_weight(T x) {
  return exp2_weight(set1(x)).v[0];
}

}  // namespace fastconv::FASTCONV_TARGET

// The epilogue of a convolution, on one sum in a register: y = activation(sum + bias[k] + residual).
#pragma once

#include "cuda/blocks/element.h"

namespace fastconv::sm80 {

// 1 / (1 + exp(-x)) through exp(-|x|), which cannot overflow, so that it keeps its relative accuracy on both sides.
FC_DEVICE float times_sigmoid(float numerator, float x) {
  const float e = expf(-fabsf(x));
  return (x < 0 ? numerator * e : numerator) / (1 + e);
}

// fminf and fmaxf drop NaN; comparisons that keep x where they are false do not.
FC_DEVICE float clamp(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

FC_DEVICE float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::none:
      break;
    case Activation::relu:
      return x < 0 ? 0 : x;
    case Activation::relu6:
      return clamp(x, 0, 6);
    case Activation::silu:
      return times_sigmoid(x, x);
    case Activation::hardswish:
      return x * (clamp(x + 3, 0, 6) * (1.0f / 6));
    case Activation::gelu:
      // erfc keeps the digits that 1 + erf loses for negative x.
      return 0.5f * x * erfcf(x * -0.70710678f);
    case Activation::gelu_tanh:
      // 1 + tanh(u) is 2 / (1 + exp(-2u)), which loses no digits for negative x.
      return times_sigmoid(x, x * (1.59576912f + 0.0713548163f * x * x));
    case Activation::sigmoid:
      return times_sigmoid(1, x);
  }
  return x;
}

// A call, not inlined: a thread has up to 64 outputs, and as many copies of every activation took half of a kernel's compile
// time.
template <class T>
__device__ __noinline__ float finish(float sum, const T* residual, Activation activation) {
  if (residual) sum += to_float(*residual);
  return activate(activation, sum);
}

// Where an output's bias and residual are, null where the problem has none.
template <class T>
struct EpilogueOperands {
  const T *bias, *residual;

  static EpilogueOperands of(const Conv2dProblem& a, const Conv2dArgs& args) {
    return {a.epilogue.bias ? static_cast<const T*>(args.bias) : nullptr,
            a.epilogue.residual ? static_cast<const T*>(args.residual) : nullptr};
  }
  // The operands of images n and later.
  EpilogueOperands from_image(int64_t n, int64_t stride) const { return {bias, residual ? residual + n * stride : nullptr}; }

  FC_DEVICE T apply(Activation activation, float sum, int64_t k, int64_t offset) const {
    if (bias) sum += to_float(bias[k]);
    const bool simple = !residual && activation == Activation::none;
    return from_float<T>(simple ? sum : finish(sum, residual ? residual + offset : nullptr, activation));
  }
};

}  // namespace fastconv::sm80

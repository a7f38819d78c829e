// Fused multiply-adds on registers and nothing else: what core/peak measures the ceiling with.
#include "cpu/simd/vec.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// 2 ports x latency 4 (Skylake) or 5 (Zen) need 8 to 10 independent chains; 12 fit into the 16 registers of AVX2 with room to
// spare.
constexpr int kChains = 12;

template <class T>
double fma_burst(int rounds) {
  vec<T> chain[kChains];
  for (int i = 0; i < kChains; ++i) chain[i] = set1<T>(T(1) + T(i));
  vec<T> scale = set1<T>(T(0.999)), shift = set1<T>(T(0.001));
  for (int round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) chain[i] = fma(chain[i], scale, shift);
    asm volatile("" : "+v"(scale.v), "+v"(shift.v));  // keeps the loop from being folded
  }
  vec<T> sum = zero<T>();
  for (int i = 0; i < kChains; ++i) sum = sum + chain[i];
  asm volatile("" : : "v"(sum.v));
  return 2.0 * kChains * kLanes<T> * rounds;
}

}  // namespace

double fma_burst_f32(int rounds) { return fma_burst<float>(rounds); }
double fma_burst_f64(int rounds) { return fma_burst<double>(rounds); }

}  // namespace fastconv::FASTCONV_TARGET

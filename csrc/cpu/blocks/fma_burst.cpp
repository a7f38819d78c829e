// Fused multiply-adds on registers and nothing else: what core/peak measures the ceiling with.
#include "cpu/simd/half.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// 2 ports x latency 4 (Skylake) or 5 (Zen) need 8 to 10 independent chains; 12 fit into the 16 registers of AVX2 with room to
// spare.
constexpr int kChains = 12;
// VDPBF16PS has a latency of 6 on Zen 5: 12 chains reach 476 of the 509 GFLOP/s that 16 do.
[[maybe_unused]] constexpr int kPairChains = 16;

template <class T>
[[maybe_unused]] double fma_burst(int rounds) {
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

#if FC_HAS_PAIRS
double fma_burst_bf16(int rounds) {
  vec<float> chain[kPairChains];
  for (int i = 0; i < kPairChains; ++i) chain[i] = set1(1.0f + float(i));
  // Two bf16 of 1 and of 2^-7 in each lane.
  vec<float> ones = {(vec<float>::raw)index_set1<float>(0x3F803F80).v},
             small = {(vec<float>::raw)index_set1<float>(0x3C003C00).v};
  for (int round = 0; round < rounds; ++round) {
#pragma GCC unroll 16
    for (int i = 0; i < kPairChains; ++i) chain[i] = add_pairs(chain[i], ones, small);
    asm volatile("" : "+v"(ones.v), "+v"(small.v));
  }
  vec<float> sum = zero<float>();
  for (int i = 0; i < kPairChains; ++i) sum = sum + chain[i];
  asm volatile("" : : "v"(sum.v));
  return 4.0 * kPairChains * kLanes<float> * rounds;
}
#else
double fma_burst_f32(int rounds) { return fma_burst<float>(rounds); }
double fma_burst_f64(int rounds) { return fma_burst<double>(rounds); }
#endif

}  // namespace fastconv::FASTCONV_TARGET

// Which attention weights dropout keeps: a counter-based generator, so that forward, backward and every order of the work see the
// same weights, and nothing is stored.
//
// The place (b, h, i) of a row and the key of the call give 64 bits (the finalizer of SplitMix64: Steele, Lea, Flood 2014); 32 of
// them are added to the key index times the golden ratio, and what comes out goes through two rounds of xor-shift and multiply
// (constants: Wellons' search for low bias), with the other 32 bits in between.
#pragma once

#include "core/problem.h"
#include "cpu/simd/vec.h"

namespace fastconv::FASTCONV_TARGET {

struct DropoutRow {
  uint32_t start, twist;
};

FC_INLINE DropoutRow dropout_row(const SdpaProblem& a, int64_t b, int64_t h, int64_t i) {
  uint64_t x = uint64_t(a.dropout.key) + uint64_t((b * a.Hq + h) * a.Lq + i + 1) * 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  x ^= x >> 31;
  return {uint32_t(x), uint32_t(x >> 32)};
}

template <class T>
struct unsigned_raw;
template <>
struct unsigned_raw<float> {
  typedef uint32_t type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct unsigned_raw<double> {
  typedef uint64_t type __attribute__((vector_size(kVectorBytes)));
};

// weight[j - first] *= (kept ? 1 / (1 - p) : 0) for the keys first .. first + count - 1. Whole vectors are touched.
template <class T>
FC_INLINE void drop(const SdpaProblem& a, DropoutRow row, int64_t first, int64_t count, T* weight) {
  using U = typename unsigned_raw<T>::type;
  // 24 bits decide: as many as a float has, and comparable as signed integers.
  const int64_t threshold = int64_t(a.dropout.p * (1 << 24) + 0.5);
  const T keep = a.dropout.p < 1 ? T(1 / (1 - a.dropout.p)) : T(0);
  U place = (U)index_iota<T>().v + uint32_t(first);
  for (int64_t j = 0; j < count; j += kLanes<T>, place += kLanes<T>) {
    // In 64-bit lanes the arithmetic is that of 32 bits, so both precisions drop the same weights.
    constexpr uint32_t kLow = 0xFFFFFFFFu;
    U x = ((place * 0x9E3779B9u) + row.start) & kLow;
    x ^= x >> 16;
    x = (x * 0x21F0AAADu) & kLow;
    x ^= (x >> 15) ^ row.twist;
    x = (x * 0xD35A2D97u) & kLow;
    x ^= x >> 15;
    const auto kept = (x >> 8) >= (uint32_t)threshold;
    const vec<T> factor = {(typename vec<T>::raw)((U)set1(keep).v & (U)kept)};
    store(weight + j, load(weight + j) * factor);
  }
}

}  // namespace fastconv::FASTCONV_TARGET

// Which attention weights dropout keeps: the counter-based generator of the CPU's kernels (cpu/blocks/dropout.h), so that both
// drop the same weights for the same key.
#pragma once

#include "cuda/blocks/device.h"

namespace fastconv::sm80 {

struct DropoutRow {
  uint32_t start, twist;
};

// The row with this number among all (b, h, i): the finalizer of SplitMix64 (Steele, Lea, Flood 2014).
FC_INLINE DropoutRow dropout_row(int64_t key, int64_t row) {
  uint64_t x = uint64_t(key) + uint64_t(row + 1) * 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  x ^= x >> 31;
  return {uint32_t(x), uint32_t(x >> 32)};
}

// What 24 bits are compared with: as many as the CPU compares.
inline uint32_t dropout_threshold(double p) { return uint32_t(p * (1 << 24) + 0.5); }

FC_INLINE bool dropout_keeps(DropoutRow row, int j, uint32_t threshold) {
  uint32_t x = uint32_t(j) * 0x9E3779B9u + row.start;
  x ^= x >> 16;
  x *= 0x21F0AAADu;
  x ^= (x >> 15) ^ row.twist;
  x *= 0xD35A2D97u;
  x ^= x >> 15;
  return (x >> 8) >= threshold;
}

}  // namespace fastconv::sm80

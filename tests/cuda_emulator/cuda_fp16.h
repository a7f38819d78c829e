// IEEE half precision in software, for cuda_runtime.h beside it.
#pragma once

#include <bit>

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};

inline float __half2float(__half h) {
  const uint32_t sign = uint32_t(h.bits & 0x8000) << 16, magnitude = h.bits & 0x7FFF;
  if (magnitude >= 0x7C00) return std::bit_cast<float>(sign | 0x7F800000u | (magnitude & 0x3FF) << 13);
  // Scaled from the exponent's bias of 15 to 127 by a multiplication, which is exact for denormals too.
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude << 13) * 0x1p112f));
}

// To nearest, ties to even.
inline __half __float2half_rn(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return {uint16_t(sign | 0x7E00)};
  if (magnitude >= 0x477FF000) return {uint16_t(sign | 0x7C00)};  // 65520 and more
  if (magnitude < 0x38800000) {                                   // below 2^-14: a multiple of 2^-24
    return {uint16_t(sign | uint32_t(std::nearbyint(std::bit_cast<float>(magnitude) * 0x1p24f)))};
  }
  const uint32_t rounded = magnitude + 0xFFF + (magnitude >> 13 & 1);
  return {uint16_t(sign | (rounded - 0x38000000) >> 13)};
}

// From the number of a thread to the element it computes.
//
// Numbers are 32 bits wide, since a 64-bit division costs a hundred instructions, more than all the rest of a small window;
// offsets into memory are 64 bits wide. A tensor with more elements than that is computed some images at a time.
#pragma once

#include "cuda/blocks/device.h"

namespace fastconv::sm80 {

// Division of 0 <= n < 2^31 by a constant known on the host: a multiplication and a shift (Granlund and Montgomery, 1994). With
// l = ceil(log2 d), m = ceil(2^(31 + l) / d) < 2^32 is exact enough for 31-bit numbers.
struct Divisor {
  uint32_t d, multiplier, shift;

  static Divisor by(int64_t d) {
    if (d == 1) return {1, 0, 0};
    uint32_t l = 0;
    while ((int64_t(1) << l) < d) ++l;
    return {uint32_t(d), uint32_t(((uint64_t(1) << (31 + l)) + uint64_t(d) - 1) / uint64_t(d)), l - 1};
  }
  FC_INLINE uint32_t quotient(uint32_t n) const { return d == 1 ? n : uint32_t((uint64_t(n) * multiplier) >> 32) >> shift; }
  // n becomes the quotient; returns the remainder.
  FC_INLINE uint32_t take(uint32_t& n) const {
    const uint32_t q = quotient(n), rest = n - q * d;
    n = q;
    return rest;
  }
};

struct Place {
  int n, c, h, w;
};

// The elements of a (N, C, H, W) tensor in the order they lie in memory, so that neighbouring threads meet neighbouring elements:
// channels innermost where the tensor is channels_last. A thread may own `pack` neighbouring channels.
struct Walk {
  Divisor inner, middle, outer;
  bool channels_last;
  uint32_t image;  // elements, or packs, of one image

  static Walk over(const Stride4& s, int64_t C, int64_t H, int64_t W, int pack) {
    const bool last = s.c < s.w || pack > 1;
    const int64_t c = C / pack;
    return {Divisor::by(last ? c : W), Divisor::by(last ? W : H), Divisor::by(last ? H : c), last, uint32_t(c * H * W)};
  }
  FC_INLINE Place place(uint32_t i) const {
    const int a = int(inner.take(i)), b = int(middle.take(i)), c = int(outer.take(i));
    return channels_last ? Place{int(i), a, c, b} : Place{int(i), c, b, a};
  }
};

inline constexpr int64_t kMostThreads = int64_t(1) << 30;

// The number of this thread.
FC_DEVICE uint32_t thread_number() { return blockIdx.x * blockDim.x + threadIdx.x; }

// body(first image, images) for as many images at a time as have at most kMostThreads elements.
template <class Body>
void for_image_ranges(int64_t images, int64_t elements_of_one, const Body& body) {
  const int64_t most = kMostThreads / elements_of_one;
  for (int64_t n = 0; n < images; n += most) body(n, images - n < most ? images - n : most);
}

// Such tensors have images of 4 GB and more.
inline bool image_too_large(int64_t elements) { return elements > kMostThreads; }

}  // namespace fastconv::sm80

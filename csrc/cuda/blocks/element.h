// Elements as they lie in memory, and packs of them that one instruction moves. Arithmetic is in float whatever is stored.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/blocks/device.h"

namespace fastconv::sm80 {

FC_DEVICE float to_float(float x) { return x; }
FC_DEVICE float to_float(__half x) { return __half2float(x); }
FC_DEVICE float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
FC_DEVICE T from_float(float x);
template <>
FC_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
FC_DEVICE __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
FC_DEVICE __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// Elements of a 16-byte access, the widest there is: a warp then moves 512 bytes, four whole cache lines, with one instruction.
template <class T>
inline constexpr int kWide = 16 / int(sizeof(T));

// kCount neighbours, aligned to their size.
template <class T, int kCount>
struct alignas(kCount * sizeof(T)) Pack {
  T v[kCount];
};

template <int kCount, class T>
FC_DEVICE Pack<T, kCount> load_pack(const T* p) {
  return *reinterpret_cast<const Pack<T, kCount>*>(p);
}
template <int kCount, class T>
FC_DEVICE void store_pack(T* p, const Pack<T, kCount>& pack) {
  *reinterpret_cast<Pack<T, kCount>*>(p) = pack;
}

// A dimension of a tensor. Nobody takes a step where the size is 1, so its stride says nothing: torch gives a row of C numbers,
// as a 1x1 image in its default format, the strides (C, 1, 1, 1).
struct Dimension {
  int64_t size, stride;
};

// Whether packs of kWide<T> may start at every element of these dimensions, the first of which is at p.
template <class T>
bool packs_fit(const void* p, std::initializer_list<Dimension> dimensions) {
  bool fit = reinterpret_cast<uintptr_t>(p) % 16 == 0;
  for (const Dimension& d : dimensions) fit = fit && (d.size == 1 || d.stride % kWide<T> == 0);
  return fit;
}

}  // namespace fastconv::sm80

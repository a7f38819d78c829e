// Rows of layer normalisation, a warp for each: which numbers a lane has, and sums over a row.
//
// Lane l owns the packs of 16 bytes l, l + 32, ... of a row, whether or not memory is aligned for them: the order of a sum
// follows from the row's length alone.
#pragma once

#include "cuda/blocks/element.h"

namespace fastconv::sm80 {

// Eight rows, whose lanes never wait for each other.
inline constexpr int kNormThreads = 256, kNormRows = kNormThreads / kWarp;

FC_DEVICE int64_t norm_row() { return int64_t(blockIdx.x) * kNormRows + threadIdx.x / kWarp; }

// body(c) for the packs of this lane, which begin at number c of the row.
template <class T, class Body>
FC_DEVICE void for_packs(int64_t C, const Body& body) {
  for (int64_t c = int64_t(threadIdx.x % kWarp) * kWide<T>; c < C; c += kWarp * kWide<T>) body(c);
}

// The pack at row[c], in float; zeros behind the row's end. `wide`: packs are aligned and whole.
template <class T>
FC_DEVICE Pack<float, kWide<T>> load_numbers(const T* row, int64_t c, int64_t C, bool wide) {
  Pack<float, kWide<T>> numbers;
  if (wide) {
    const Pack<T, kWide<T>> pack = load_pack<kWide<T>>(row + c);
    FC_UNROLL
    for (int i = 0; i < kWide<T>; ++i) numbers.v[i] = to_float(pack.v[i]);
  } else {
    FC_UNROLL
    for (int i = 0; i < kWide<T>; ++i) numbers.v[i] = c + i < C ? to_float(row[c + i]) : 0.0f;
  }
  return numbers;
}

template <class T>
FC_DEVICE void store_numbers(T* row, int64_t c, int64_t C, bool wide, const Pack<float, kWide<T>>& numbers) {
  Pack<T, kWide<T>> pack;
  FC_UNROLL
  for (int i = 0; i < kWide<T>; ++i) pack.v[i] = from_float<T>(numbers.v[i]);
  if (wide) {
    store_pack(row + c, pack);
    return;
  }
  FC_UNROLL
  for (int i = 0; i < kWide<T>; ++i) {
    if (c + i < C) row[c + i] = pack.v[i];
  }
}

// Over all lanes, the same for each of them.
FC_DEVICE float add_lanes(float x) {
  FC_UNROLL
  for (int bits = 1; bits < kWarp; bits *= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, bits);
  return x;
}

template <class T>
bool norm_is_wide(const NormProblem& a, std::initializer_list<const void*> operands) {
  bool wide = a.C % kWide<T> == 0;
  for (const void* p : operands) wide = wide && packs_fit<T>(p, {});
  return wide;
}

inline const char* norm_reject(const NormProblem& a) {
  if (a.N <= 0 || a.C <= 0) return "there is nothing to normalise";
  return a.N > 1 << 30 || a.C > 1 << 30 ? "there are more than 2^30 rows or columns" : nullptr;
}

// Each operand once at 2 TB/s, an A100's bandwidth: only compared, and there is one kernel to each op so far.
template <class T, int kOperands>
double norm_cost(const NormProblem& a, const Machine&) {
  return double(a.N) * double(a.C) * kOperands * sizeof(T) / 2e12;
}

inline int64_t norm_blocks(const NormProblem& a) { return (a.N + kNormRows - 1) / kNormRows; }

}  // namespace fastconv::sm80

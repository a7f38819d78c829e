// The twins of what csrc/cuda/blocks/{copy,mma}.h say in PTX, written from the PTX manual's tables of fragments.
#pragma once

#include <cmath>

#include "emulator.h"

namespace emulator {

// What the 32 lanes give to one ldmatrix: matrix i has the rows of the lanes 8 i .. 8 i + 7.
struct MatrixRow {
  uintptr_t address;
  unsigned char bytes[16];
  uint16_t at(int column) const {
    uint16_t half;
    std::memcpy(&half, bytes + 2 * column, 2);
    return half;
  }
};

FC_UNSEEN inline Warp<MatrixRow> matrix_rows(const void* row, Site site, const void* where) {
  MatrixRow mine;
  mine.address = uintptr_t(row);
  if (mine.address % 16 != 0) fail("ldmatrix: a row that is not aligned to 16 bytes");
  races::read(row, 16, where);
  std::memcpy(mine.bytes, row, 16);
  const Warp<MatrixRow> rows = exchange(mine, site);
  for (int matrix = 0; matrix < 4; ++matrix) {
    unsigned banks = 0;
    for (int i = 0; i < 8; ++i) banks |= 1u << rows.lane[8 * matrix + i].address / 16 % 8;
    if (banks != 0xFF) fail("ldmatrix: two rows of a matrix in the same banks");
  }
  return rows;
}

[[gnu::noinline]] FC_UNSEEN inline void load_matrices(uint32_t (&r)[4], const void* row, Site site) {
  const Warp<MatrixRow> rows = matrix_rows(row, site, __builtin_return_address(0));
  const int lane = int(self().thread.x % kWarp), column = lane % 4 * 2;
  for (int matrix = 0; matrix < 4; ++matrix) {
    const MatrixRow& mine = rows.lane[8 * matrix + lane / 4];
    r[matrix] = uint32_t(mine.at(column)) | uint32_t(mine.at(column + 1)) << 16;
  }
}

[[gnu::noinline]] FC_UNSEEN inline void load_matrices_transposed(uint32_t (&r)[4], const void* row, Site site) {
  const Warp<MatrixRow> rows = matrix_rows(row, site, __builtin_return_address(0));
  const int lane = int(self().thread.x % kWarp), first = lane % 4 * 2;
  for (int matrix = 0; matrix < 4; ++matrix) {
    const MatrixRow* const mine = rows.lane + 8 * matrix;
    r[matrix] = uint32_t(mine[first].at(lane / 4)) | uint32_t(mine[first + 1].at(lane / 4)) << 16;
  }
}

// What a warp gives to one mma.sync.
struct Fragments {
  uint32_t a[4], b[2];
};

FC_UNSEEN inline Warp<Fragments> fragments(const uint32_t (&a)[4], const uint32_t (&b)[2], Site site) {
  Fragments mine;
  std::memcpy(mine.a, a, sizeof a);
  std::memcpy(mine.b, b, sizeof b);
  return exchange(mine, site);
}

// `value` is what 16 bits stand for.
template <class Value>
FC_UNSEEN void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Value value, Site site) {
  const Warp<Fragments> all = fragments(a, b, site);
  const auto half = [&](uint32_t pair, int k) { return value(uint16_t(k % 2 ? pair >> 16 : pair)); };
  const int lane = int(self().thread.x % kWarp);
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int pair = k % 8 / 2;
      const float x = half(all.lane[row % 8 * 4 + pair].a[row / 8 + k / 8 * 2], k),
                  y = half(all.lane[column * 4 + pair].b[k / 8], k);
      c[i] = std::fma(x, y, c[i]);
    }
  }
}

// cvt.rna.tf32.f32: to a mantissa of 10 bits, to nearest, ties away from zero. Infinities and NaN stay what they are.
inline uint32_t round_to_tf32(uint32_t bits) {
  constexpr uint32_t kDropped = (1u << 13) - 1, kInfinity = 0x7F800000u;
  if ((bits & kInfinity) == kInfinity) return bits & 0x7FFFFFu ? 0x7FFFE000u : bits;
  return (bits + (kDropped + 1) / 2) & ~kDropped;
}

FC_UNSEEN inline void multiply_add_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site) {
  const Warp<Fragments> all = fragments(a, b, site);
  const auto value = [](uint32_t bits) {
    // The hardware would truncate: twice the error, and always towards zero.
    if (bits != round_to_tf32(bits)) fail("mma.sync: an operand that is not rounded to tf32");
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  };
  const int lane = int(self().thread.x % kWarp);
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 8; ++k) {
      const float x = value(all.lane[row % 8 * 4 + k % 4].a[row / 8 + k / 4 * 2]),
                  y = value(all.lane[column * 4 + k % 4].b[k / 4]);
      c[i] = std::fma(x, y, c[i]);
    }
  }
}

}  // namespace emulator

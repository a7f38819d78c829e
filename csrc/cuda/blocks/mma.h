// Matrix instructions of a warp (PTX ISA, ldmatrix and mma.sync): fragments of 16-bit numbers, products summed in fp32.
//
//   A (16 x 16), row by row:   lane l holds rows l/4 and l/4 + 8, columns 2 (l%4) + {0, 1} and those + 8:  a[row / 8 + 2 (k / 8)]
//   B (16 x 8), by columns:    lane l holds column l/4, rows 2 (l%4) + {0, 1} and those + 8:               b[k / 8]
//   C (16 x 8), in fp32:       lane l holds rows l/4 and l/4 + 8, columns 2 (l%4) + {0, 1}:                c[2 (row / 8) + column
//   % 2]
//
// Floats are multiplied as tf32, whose mantissa has 10 bits: A is 16 x 8 and B is 8 x 8, and a word that has two halves above has
// one float, at half the column (of A) or row (of B). So the same ldmatrix brings either.
//
// All 32 lanes call these together.
#pragma once

#include <cstring>
#include <type_traits>

#include "cuda/blocks/element.h"

namespace fastconv::sm80 {

// Four 8 x 8 matrices of 16-bit numbers from shared memory. Lane l gives the address of row l % 8 of matrix l / 8, 16 bytes
// aligned to 16; r[i] is row l / 4, columns 2 (l % 4) + {0, 1} of matrix i. The rows of a matrix should lie in different banks.
FC_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
#ifdef FASTCONV_EMULATED
  ::emulator::load_matrices(r, row, FC_SITE);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(unsigned(__cvta_generic_to_shared(row)))
               : "memory");
#endif
}

// The same, transposed: r[i] is column l / 4, rows 2 (l % 4) + {0, 1} of matrix i. That is a fragment of B from a matrix that
// lies row by row.
FC_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
#ifdef FASTCONV_EMULATED
  ::emulator::load_matrices_transposed(r, row, FC_SITE);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(unsigned(__cvta_generic_to_shared(row)))
               : "memory");
#endif
}

// The bits of four bytes. A copy and not another type's pointer, behind which the compiler need not see the write.
template <class T>
FC_DEVICE uint32_t word_of(const T& value) {
  static_assert(sizeof(T) == 4);
  uint32_t word;
  memcpy(&word, &value, sizeof word);
  return word;
}

// Two neighbours of a fragment, the first one in the lower half.
template <class T>
FC_DEVICE uint32_t pair_of(float low, float high) {
  return word_of(Pack<T, 2>{{from_float<T>(low), from_float<T>(high)}});
}

// Products of two numbers rounded to tf32 are off by 2^-10 of themselves, where a plain sum in fp32 may be off by 4 eps = 2^-21
// of them (testing/tolerance.py).
inline constexpr float kTf32Growth = 2048;

// Makes of a word of a fragment what the matrix instruction multiplies: floats are rounded to tf32, to nearest, ties away from 0.
// The instruction itself would drop the other 13 bits.
template <class T>
FC_DEVICE void round_operand(uint32_t& word) {
  if constexpr (std::is_same_v<T, float>) {
#ifdef FASTCONV_EMULATED
    word = ::emulator::round_to_tf32(word);
#else
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(word) : "f"(__uint_as_float(word)));
#endif
  }
}

// c += A * B for 16 x 8 sums over 16 products of halves, or 8 of floats that are rounded.
template <class T>
FC_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef FASTCONV_EMULATED
  if constexpr (std::is_same_v<T, float>) {
    ::emulator::multiply_add_tf32(c, a, b, FC_SITE);
  } else {
    ::emulator::multiply_add(c, a, b, [](uint16_t bits) { return to_float(T{bits}); }, FC_SITE);
  }
#else
#define FC_MMA(shape, type)                                                  \
  asm("mma.sync.aligned." shape ".row.col.f32." type "." type                \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                       \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (std::is_same_v<T, float>) {
    FC_MMA("m16n8k8", "tf32");
  } else if constexpr (std::is_same_v<T, __half>) {
    FC_MMA("m16n8k16", "f16");
  } else {
    FC_MMA("m16n8k16", "bf16");
  }
#undef FC_MMA
#endif
}

}  // namespace fastconv::sm80

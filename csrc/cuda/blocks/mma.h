// Matrix instructions of a warp (PTX ISA, ldmatrix and mma.sync): fragments of 16-bit numbers, products summed in fp32.
//
//   A (16 x 16), row by row:   lane l holds rows l/4 and l/4 + 8, columns 2 (l%4) + {0, 1} and those + 8:  a[row / 8 + 2 (k / 8)]
//   B (16 x 8), by columns:    lane l holds column l/4, rows 2 (l%4) + {0, 1} and those + 8:               b[k / 8]
//   C (16 x 8), in fp32:       lane l holds rows l/4 and l/4 + 8, columns 2 (l%4) + {0, 1}:                c[2 (row / 8) + column
//   % 2]
//
// All 32 lanes call these together.
#pragma once

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

// Two neighbours of a fragment, the first one in the lower half.
template <class T>
FC_DEVICE uint32_t pair_of(float low, float high) {
  const Pack<T, 2> pair = {{from_float<T>(low), from_float<T>(high)}};
  return reinterpret_cast<const uint32_t&>(pair);
}

// c += A * B for 16 x 8 sums over 16 products.
template <class T>
FC_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef FASTCONV_EMULATED
  ::emulator::multiply_add(c, a, b, [](uint16_t bits) { return to_float(T{bits}); }, FC_SITE);
#else
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

}  // namespace fastconv::sm80

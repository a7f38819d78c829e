// The inner product of everything that is a matrix multiplication: a tile of rows x vectors held in registers.
//
//   sum[m][v] = sum over taps t, depth d of  a[t*rows + m][d*a_step] * b[(t*depth + d)*width + v*lanes ...]
//
// The broadcast operand `a` is read where it lies, through one pointer per row and tap (a convolution's pixels, a filter's row, a
// zero row for padding: the indirection of Dukhan 2019). The vector operand `b` is a packed panel. Every sum is one chain of FMAs
// in the order (t, d), so its bits depend neither on the shape of the tile nor on what else is in it.
#pragma once

#include "core/kernel.h"
#include "cpu/simd/vec.h"

namespace fastconv::FASTCONV_TARGET {

// Tiles fill the register file: rows*vectors accumulators, `vectors` of b and one broadcast.
//   32 registers (AVX-512): 6x4 = 24 (+5), 8x3, 10x2, 10x1      10 loads for 24 FMAs in 6x4: under the two loads a cycle
//   16 registers (AVX2, baseline): 3x4 = 12 would leave none for b twice; 4x3 = 12 (+4), 6x2 = 12 (+3), 8x1
// Ten rows and not more: each has a pointer, and of sixteen the loop itself needs five. A tile of 14x1 kept pointers in vector
// registers and took 13.7 cycles for what should take 7.5.
struct GemmTile {
  static constexpr int kMaxVectors = kVectorRegisters == 32 ? 4 : 3;
  static constexpr int kMaxRows = kVectorRegisters == 32 ? 10 : 8;
  static constexpr int rows(int vectors) {
    if (kVectorRegisters == 32) return vectors == 4 ? 6 : vectors == 3 ? 8 : 10;
    return vectors == 3 ? 4 : vectors == 2 ? 6 : 8;
  }
};
static_assert(GemmTile::rows(GemmTile::kMaxVectors) * GemmTile::kMaxVectors + GemmTile::kMaxVectors + 1 <= kVectorRegisters);

template <class T>
struct TileInput {
  const T* const* a;  // [taps][rows]
  int64_t a_step;     // elements from one depth to the next
  const T* b;         // [taps*depth][width], and kMaxVectors vectors may be read from every row
  int64_t width;      // elements from one row of b to the next
  int64_t taps;
  int64_t depth;  // of one tap
  // Where given, `a` holds one pointer for each row, and tap t lies so many elements behind it.
  const int64_t* tap_offsets = nullptr;
  const char* next = nullptr;  // a line of it is fetched into L2 at every depth: what is packed after this tile, or absent
};

// Columns begin..end-1 of a tile lie at y[m] + offset + (column - begin)*step. A convolution's rows end where they end: a tile of
// 64 pixels of 7x7 maps is made of ten pieces.
struct ColumnPiece {
  int32_t begin, end;
  int64_t offset, step;
};

// Where a tile goes: y[m][column] = sum, plus what is there when `accumulate`, and through the epilogue when `finish`.
template <class T>
struct TileOutput {
  T* const* y;  // [rows]
  const ColumnPiece* pieces;
  int32_t piece_count;
  bool accumulate, finish;
  Activation activation;
  const T* column_bias;  // [columns], [rows] or absent
  const T* row_bias;
  const T* residual;  // of the element at y_base, or absent; laid out as y is
  const T* y_base;
};

// The end of a tile whose sums lie in memory: [rows][width].
template <class T>
void store_sums(const T* sums, int width, int rows, const TileOutput<T>& out);

// One tile of 1 <= rows <= GemmTile::rows(vectors). Compiled once for each ISA, in gemm_tile.cpp.
template <class T>
void gemm_tile(int rows, int vectors, const TileInput<T>& in, const TileOutput<T>& out);

extern template void store_sums(const float*, int, int, const TileOutput<float>&);
extern template void store_sums(const double*, int, int, const TileOutput<double>&);
extern template void gemm_tile(int, int, const TileInput<float>&, const TileOutput<float>&);
extern template void gemm_tile(int, int, const TileInput<double>&, const TileOutput<double>&);

}  // namespace fastconv::FASTCONV_TARGET

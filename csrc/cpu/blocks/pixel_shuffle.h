// From a stage of blocks (blocks/subpixel.h) to the image they are blocks of: the pixel shuffle.
#pragma once

#include "cpu/blocks/subpixel.h"

namespace fastconv::FASTCONV_TARGET {

// What a stage holds: blocks row .. row + rows of some samples, all that their pieces make of them.
// NCHW: [filter][sample][block row][block]. Channels last: for each piece [sample][block row][block][filter].
struct StagedBlocks {
  int64_t samples, row, rows, columns;
  FC_INLINE int64_t pixels() const { return samples * rows * columns; }
};

// Most residues of columns; one row of the image is interleaved from so many.
inline constexpr int64_t kMaxShuffled = 64;

// to[i*count + q] = from[q][i] for all q < count, i < length.
template <class T>
FC_INLINE void interleave_rows(const T* const* from, int64_t count, int64_t length, T* to) {
  constexpr int kL = kLanes<T>;
  int64_t i = 0;
  if (count == 2) {
    for (; i + kL <= length; i += kL) {
      vec<T> low, high;
      interleave(load(from[0] + i), load(from[1] + i), low, high);
      store(to + 2 * i, low), store(to + 2 * i + kL, high);
    }
  } else if (count == 4) {
    for (; i + kL <= length; i += kL) {
      vec<T> even[2], odd[2], out[4];
      interleave(load(from[0] + i), load(from[2] + i), even[0], even[1]);
      interleave(load(from[1] + i), load(from[3] + i), odd[0], odd[1]);
      interleave(even[0], odd[0], out[0], out[1]);
      interleave(even[1], odd[1], out[2], out[3]);
#pragma GCC unroll 4
      for (int m = 0; m < 4; ++m) store(to + 4 * i + m * kL, out[m]);
    }
  } else if (count > 4) {
    for (; i < length; i += kL) {
      const int n = int(length - i < kL ? length - i : kL);
      for (int64_t q = 0; q < count; q += kL) {
        const int lanes = int(count - q < kL ? count - q : kL);
        vec<T> block[kL];
#pragma GCC unroll 16
        for (int m = 0; m < kL; ++m) block[m] = m < lanes ? load(from[q + m] + i, n) : zero<T>();
        transpose(block);
#pragma GCC unroll 16
        for (int m = 0; m < kL; ++m) {
          if (m < n) store(to + (i + m) * count + q, block[m], lanes);
        }
      }
    }
  }
  for (; i < length; ++i) {
    for (int64_t q = 0; q < count; ++q) to[i * count + q] = from[q][i];
  }
}

// One row of one channel of x, NCHW: blocks `from[residue][block]`, of which the first and the last may stick out.
template <class T>
FC_INLINE void shuffle_row(const SubpixelAxis& w, const T* const* from, T* x) {
  const int64_t inside = w.pad % w.stride == 0 ? 0 : 1;  // first block that is whole
  const int64_t begin = w.first * w.stride - w.pad;      // column of the first block, 0 or negative
  const int64_t whole = (w.size - begin) / w.stride;     // blocks before the one that is cut off to the right
  const T* rows[kMaxShuffled];
  for (int64_t q = 0; q < w.stride; ++q) rows[q] = from[q] + inside;
  if (whole > inside) interleave_rows(rows, w.stride, whole - inside, x + begin + inside * w.stride);
  const int64_t left = begin + inside * w.stride < w.size ? begin + inside * w.stride : w.size;
  for (int64_t column = 0; column < left; ++column) x[column] = from[column - begin][0];
  for (int64_t column = whole > inside ? begin + whole * w.stride : left; column < w.size; ++column) {
    x[column] = from[(column - begin) % w.stride][(column - begin) / w.stride];
  }
}

// One channel of one sample.
template <class T>
void shuffle_plane(const Conv2dProblem& a, const SubpixelPieces& all, const StagedBlocks& staged, const T* stage, int64_t sample,
                   int64_t channel, T* x) {
  const SubpixelAxis h = subpixel_rows(a), w = subpixel_columns(a);
  const int64_t plane = staged.pixels();
  for (int64_t row = 0; row < staged.rows; ++row) {
    for (int64_t residue = all.begin; residue < all.end; ++residue) {
      const int64_t to = (h.first + staged.row + row) * h.stride + residue - h.pad;
      if (to < 0 || to >= h.size) continue;
      const T* from[kMaxShuffled];
      const T* block = stage + (sample * staged.rows + row) * staged.columns;
      for (int i = 0; i < all.count; ++i) {
        const SubpixelPiece& piece = all.pieces[i];
        if (residue < piece.row || residue >= piece.row + piece.rows) continue;
        const int64_t filter = piece.planes + (residue - piece.row) * piece.columns * a.C + channel;
        for (int64_t q = 0; q < piece.columns; ++q) from[piece.column + q] = block + (filter + q * a.C) * plane;
      }
      shuffle_row(w, from, x + to * a.x.h);
    }
  }
}

// One block row of one sample, channels last.
template <class T>
void shuffle_pixels(const Conv2dProblem& a, const SubpixelPieces& all, const StagedBlocks& staged, const T* stage, int64_t sample,
                    int64_t row, T* x) {
  const SubpixelAxis h = subpixel_rows(a), w = subpixel_columns(a);
  const bool dense = a.x.w == a.C;
  for (int i = 0; i < all.count; ++i) {
    const SubpixelPiece& piece = all.pieces[i];
    const int64_t filters = piece.rows * piece.columns * a.C;
    const T* pixels = stage + piece.planes * staged.pixels() + (sample * staged.rows + row) * staged.columns * filters;
    for (int64_t residue = 0; residue < piece.rows; ++residue) {
      const int64_t to = (h.first + staged.row + row) * h.stride + piece.row + residue - h.pad;
      if (to < 0 || to >= h.size) continue;
      for (int64_t block = 0; block < staged.columns; ++block) {
        const T* from = pixels + block * filters + residue * piece.columns * a.C;
        const int64_t column = (w.first + block) * w.stride + piece.column - w.pad;
        const int64_t q0 = column < 0 ? -column : 0;
        const int64_t q1 = w.size - column < piece.columns ? w.size - column : piece.columns;
        if (q1 <= q0) continue;
        const int64_t runs = dense ? 1 : q1 - q0, length = dense ? (q1 - q0) * a.C : a.C;
        for (int64_t run = 0; run < runs; ++run) {
          T* out = x + to * a.x.h + (column + q0 + run) * a.x.w;
          const T* in = from + (q0 + run) * a.C;
          int64_t e = 0;
          for (; e + kLanes<T> <= length; e += kLanes<T>) store(out + e, load(in + e));
          if (e < length) store(out + e, load(in + e, int(length - e)), int(length - e));
        }
      }
    }
  }
}

}  // namespace fastconv::FASTCONV_TARGET

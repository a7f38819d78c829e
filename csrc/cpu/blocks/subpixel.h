// Transposed convolution as a dense one (Shi et al., "Real-Time Single Image and Video Super-Resolution Using an Efficient
// Sub-Pixel Convolutional Neural Network", 2016), whose results are shuffled into place (blocks/pixel_shuffle.h).
//
// Let the input gradient of a convolution of stride v be x, and u = column + pad. Columns of x with one u / v meet the same
// columns of y, under filter taps that lie v apart and begin at u % v:
//
//   x[t*v + q - pad] = sum over j of  y[t - j] * w[q + j*v]
//
// So a block t of v columns is v filters on one window. Residues q with equally many taps, of which there are at most two kinds,
// are one piece; the same holds for rows.
#pragma once

#include "cpu/blocks/columns.h"
#include "cpu/blocks/conv2d_geometry.h"
#include "cpu/blocks/split.h"

namespace fastconv::FASTCONV_TARGET {

// One axis: blocks of `stride` positions of x, the first and last of which may stick out.
struct SubpixelAxis {
  int64_t stride, size, pad, taps;  // of the convolution
  int64_t first, blocks;            // first block, and how many

  FC_INLINE SubpixelAxis(int64_t stride_, int64_t size_, int64_t pad_, int64_t taps_)
      : stride(stride_),
        size(size_),
        pad(pad_),
        taps(taps_),
        first(pad_ / stride_),
        blocks((pad_ + size_ - 1) / stride_ - first + 1) {}
  // Residues below this have one tap more than the rest.
  FC_INLINE int64_t longer() const { return taps % stride; }
  FC_INLINE int64_t taps_of(int64_t residue) const { return taps / stride + (residue < longer()); }
};

FC_INLINE SubpixelAxis subpixel_rows(const Conv2dProblem& a) { return {a.stride_h, a.H, a.pad_top, a.R}; }
FC_INLINE SubpixelAxis subpixel_columns(const Conv2dProblem& a) { return {a.stride_w, a.W, a.pad_left, a.S}; }

// Residues row .. row + rows of one kind by column .. column + columns of one kind.
struct SubpixelPiece {
  int64_t row, rows, column, columns;
  int64_t R, S;     // taps
  int64_t filters;  // elements of copied filters before its own
  int64_t planes;   // filters (residues and channels) before its own

  FC_INLINE bool empty() const { return R * S == 0; }
};

// At most four of them make up rows of residues begin .. end.
struct SubpixelPieces {
  SubpixelPiece pieces[4];
  int count = 0;
  int64_t begin, end;
  int64_t filters = 0, planes = 0;  // of all

  FC_INLINE SubpixelPieces(const Conv2dProblem& a, int64_t begin_, int64_t end_) : begin(begin_), end(end_) {
    const SubpixelAxis h = subpixel_rows(a), w = subpixel_columns(a);
    const int64_t row_cuts[3] = {begin, clamp(h.longer(), begin, end), end}, column_cuts[3] = {0, w.longer(), w.stride};
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < 2; ++j) {
        const int64_t row = row_cuts[i], rows = row_cuts[i + 1] - row;
        const int64_t column = column_cuts[j], columns = column_cuts[j + 1] - column;
        if (rows * columns == 0) continue;
        pieces[count++] = {row, rows, column, columns, h.taps_of(row), w.taps_of(column), filters, planes};
        filters += h.taps_of(row) * w.taps_of(column) * rows * columns * a.C * a.K;
        planes += rows * columns * a.C;
      }
    }
  }
};

// The convolution of a piece in forward terms, for all of its blocks; `a` has one group. Its filters are [row][column][channel of
// x]; each is [channel of y][tap] where the columns of y are contiguous, and [tap][channel of y][filter] where channels are.
FC_INLINE Conv2dProblem subpixel_problem(const Conv2dProblem& a, const SubpixelPiece& piece, bool channels_last) {
  const SubpixelAxis h = subpixel_rows(a), w = subpixel_columns(a);
  Conv2dProblem b = a;
  b.C = a.K, b.H = a.P, b.W = a.Q;
  b.K = piece.rows * piece.columns * a.C, b.P = h.blocks, b.Q = w.blocks;
  b.R = piece.R, b.S = piece.S;
  b.stride_h = b.stride_w = 1;
  b.pad_top = piece.R - 1 - h.first, b.pad_left = piece.S - 1 - w.first;
  b.x = a.y;
  const int64_t taps = b.R * b.S;
  if (channels_last) {
    b.w = {0, 1, b.K, b.S * b.C * b.K, b.C * b.K};
  } else {
    b.w = {0, b.C * taps, taps, b.S, 1};
  }
  return b;
}

// Where tap (r, s) of all filters goes: that of channel k of y and c of x to offset + k*k_step + c*c_step.
struct SubpixelTap {
  int64_t offset, k_step, c_step;
};

// Copies filters into the order of pieces. A filter's taps are neighbours in memory and far apart in the copy, where channels are
// neighbours: blocks are transposed in registers.
template <class T>
class SubpixelFilters {
 public:
  // table: [R*S]
  FC_INLINE SubpixelFilters(const Conv2dProblem& a, const SubpixelPieces& all, bool channels_last, SubpixelTap* table)
      : a_(a), all_(all), channels_last_(channels_last), table_(table) {
    for (int i = 0; i < all.count; ++i) {
      const SubpixelPiece& piece = all.pieces[i];
      const Conv2dProblem b = subpixel_problem(a, piece, channels_last);
      for (int64_t row = 0; row < piece.rows * piece.R; ++row) {
        for (int64_t column = 0; column < piece.columns * piece.S; ++column) {
          const int64_t residue = row % piece.rows, r = row / piece.rows, q = column % piece.columns, s = column / piece.columns;
          const int64_t filter = (residue * piece.columns + q) * a.C;
          const int64_t offset = piece.filters + filter * b.w.k + (piece.R - 1 - r) * b.w.r + (piece.S - 1 - s) * b.w.s;
          table[(piece.row + residue + r * a.stride_h) * a.S + piece.column + q + s * a.stride_w] = {offset, b.w.c, b.w.k};
        }
      }
    }
  }

  // Blocks of kLanes channels, of x where they are innermost in the copy, else of y; by one, or some, of the others.
  FC_INLINE int64_t blocks() const { return vectors() * EvenSplit(other(), most()).parts; }

  void copy(int64_t block, const T* w, T* to) const {
    // Neighbours in the copy come one after the other.
    const EvenSplit others(other(), most());
    const int64_t first = block % vectors() * kLanes<T>, begin = others.begin(block / vectors());
    const int64_t count = others.size(block / vectors()), taps = a_.R * a_.S;
    const int lanes = int(innermost() - first < kLanes<T> ? innermost() - first : kLanes<T>);
    const int64_t step = channels_last_ ? a_.w.c : a_.w.k, next = channels_last_ ? a_.w.k : a_.w.c;
    const T* from = w + first * step + begin * next;
    if (next == taps && in_order() && all_rows()) {  // a matrix of channels by channels and taps
      int64_t i = begin, tap = 0;
      for_each_column(from, step, lanes, count * taps, [&](int64_t, vec<T> column) {
        put(to, tap, first, i, column, lanes);
        if (++tap == taps) tap = 0, ++i;
      });
      return;
    }
    for (int64_t i = begin; i < begin + count; ++i, from += next) copy_channel(from, step, lanes, first, i, to);
  }

 private:
  // In NCHW a line of w holds several channels of x.
  FC_INLINE int64_t most() const { return channels_last_ ? 1 : 16; }
  FC_INLINE int64_t vectors() const { return (innermost() + kLanes<T> - 1) / kLanes<T>; }
  FC_INLINE int64_t innermost() const { return channels_last_ ? a_.C : a_.K; }
  FC_INLINE int64_t other() const { return channels_last_ ? a_.K : a_.C; }

  FC_INLINE bool in_order() const { return a_.w.s == 1 && (a_.w.r == a_.S || a_.R == 1); }
  FC_INLINE bool all_rows() const { return all_.end - all_.begin == a_.stride_h; }

  FC_INLINE void copy_channel(const T* from, int64_t step, int lanes, int64_t first, int64_t i, T* to) const {
    for (int64_t r = all_.begin; r < a_.R; r += a_.stride_h) {
      const int64_t end = r + all_.end - all_.begin < a_.R ? r + all_.end - all_.begin : a_.R;
      if (in_order()) {
        const int64_t tap = r * a_.S, taps = ((all_rows() ? a_.R : end) - r) * a_.S;
        for_each_column(from + tap, step, lanes, taps,
                        [&](int64_t t, vec<T> column) { put(to, tap + t, first, i, column, lanes); });
        if (all_rows()) return;
        continue;
      }
      for (int64_t tap = r * a_.S; tap < end * a_.S; ++tap) {
        const T* p = from + tap / a_.S * a_.w.r + tap % a_.S * a_.w.s;
        put(to, tap, first, i, step == 1 ? load(p, lanes) : load_strided(p, step, lanes), lanes);
      }
    }
  }

  FC_INLINE void put(T* to, int64_t tap, int64_t first, int64_t i, vec<T> column, int lanes) const {
    const SubpixelTap& t = table_[tap];
    if (channels_last_) return store(to + t.offset + i * t.k_step + first, column, lanes);
    T* out = to + t.offset + i * t.c_step + first * t.k_step;
    t.k_step == 1 ? store(out, column, lanes) : store_strided(out, t.k_step, column, lanes);
  }

  const Conv2dProblem& a_;
  const SubpixelPieces& all_;
  bool channels_last_;
  SubpixelTap* table_;
};

}  // namespace fastconv::FASTCONV_TARGET

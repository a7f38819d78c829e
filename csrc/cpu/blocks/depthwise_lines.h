// Rows of x, copied where a depthwise kernel wants them: for one block of channels and columns, padding written out as zeros,
// aligned, and kept in a ring, so that every row is fetched once and read R times from cache.
//
// The copy costs one load and one store for each vector, where a 3x3 filter costs nine FMAs, and it pays for itself three times:
// no tile has an edge, no load crosses a cache line, and no two pixels fight for a set of the cache (512 channels put the pixels
// 2048 bytes apart, which leaves two sets of a 32 KB L1 for all of them).
#pragma once

#include "cpu/blocks/conv2d_geometry.h"
#include "cpu/blocks/split.h"

namespace fastconv::FASTCONV_TARGET {

// a / b for a >= 0, b > 0. A division of 64 bits takes 40 to 90 cycles on CPUs before Ice Lake, as long as a tile; one of 32
// takes 26.
FC_INLINE int64_t divide(int64_t a, int64_t b) { return ((a | b) >> 32) == 0 ? int64_t(uint32_t(a) / uint32_t(b)) : a / b; }

// A tenth of a 1 MB L2. Lines that fit L1 (20 KB) are no faster, and wide or deep layers then come in more and narrower blocks,
// which the prefetchers like less: 144 channels at 56x56 took 372 us with 20 KB and 309 us with 96 KB.
inline constexpr int64_t kLineBytes = 96 * 1024;

// The rows that a tile of `tile_rows` output rows needs: first input row + 0 .. reach - 1, of which not all need be used.
struct LineWindow {
  int64_t reach, slots;
  bool rolling;  // slot = row modulo slots, so rows stay from one tile to the
                 // next; otherwise dilation makes that too long

  FC_INLINE LineWindow(const Conv2dProblem& a, int64_t tile_rows) {
    reach = (tile_rows - 1) * a.stride_h + (a.R - 1) * a.dilation_h + 1;
    const int64_t used = tile_rows * a.R;
    rolling = reach <= 2 * used;
    slots = rolling ? reach : used;
  }
};

// `lines[i]` becomes the copy of input row h0 + i. Rows outside of the input are a line of zeros.
template <class T>
class LineRing {
 public:
  const T** lines;  // [reach]

  FC_INLINE LineRing(const LineWindow& window, int64_t line_size, Arena& arena)
      : lines(arena.take<const T*>(window.reach)),
        window_(window),
        size_(line_size),
        zeros_(arena.take<T>(line_size)),
        ring_(arena.take<T>(window.slots * line_size)),
        missing_(arena.take<int64_t>(window.slots)),
        to_(arena.take<T*>(window.slots)) {}

  FC_INLINE void fill_zeros() {
    for (int64_t i = 0; i < size_; ++i) zeros_[i] = T(0);
  }
  // To be called when the block changes: forgets every row.
  FC_INLINE void clear() { next_ = INT64_MIN; }
  // visit(line) for all memory that rows are copied to.
  template <class Visit>
  FC_INLINE void for_each_slot(const Visit& visit) {
    for (int64_t i = 0; i < window_.slots; ++i) visit(ring_ + i * size_);
  }

  // Makes lines[0..rows) for the input rows h0.. of `height`; copy(h, to, count) copies `count` rows h[i] to to[i].
  template <class Copy>
  FC_INLINE void fetch(int64_t h0, int64_t rows, int64_t height, const Copy& copy) {
    const int64_t begin = clamp(-h0, 0, rows), end = clamp(height - h0, begin, rows);
    // Copies, because the compiler must assume that the stores below change the members.
    const int64_t slots = window_.slots, reach = window_.reach, size = size_, next = next_;
    const T** const all = lines;
    int64_t* const missing = missing_;
    T** const to = to_;
    for (int64_t i = 0; i < begin; ++i) all[i] = zeros_;
    for (int64_t i = end; i < reach; ++i) all[i] = zeros_;
    if (begin == end) return;
    const int64_t first = h0 + begin;
    int64_t count = 0;
    T* line = ring_ + (first - divide(first, slots) * slots) * size;
    T* const last = ring_ + (slots - 1) * size;
    for (int64_t i = begin; i < end; ++i) {
      all[i] = line;
      if (h0 + i >= next) missing[count] = h0 + i, to[count++] = line;
      line = line == last ? ring_ : line + size;
    }
    next_ = h0 + end;
    if (count > 0) copy(missing_, to_, count);
  }
  // The same without a ring, for the rows h0 + b*stride + r*dilation alone.
  template <class Copy>
  FC_INLINE void fetch_scattered(const Conv2dProblem& a, int64_t h0, int64_t tile_rows, const Copy& copy) {
    int64_t count = 0;
    for (int64_t i = 0; i < window_.reach; ++i) lines[i] = zeros_;
    for (int64_t b = 0; b < tile_rows; ++b) {
      for (int64_t r = 0; r < a.R; ++r) {
        const int64_t i = b * a.stride_h + r * a.dilation_h, h = h0 + i;
        if (h < 0 || h >= a.H || lines[i] != zeros_) continue;
        T* line = ring_ + count * size_;
        lines[i] = line;
        missing_[count] = h, to_[count++] = line;
      }
    }
    if (count > 0) copy(missing_, to_, count);
  }
  // Either, for output rows p0 .. p0 + tile_rows - 1.
  template <class Copy>
  FC_INLINE void fetch_tile(const Conv2dProblem& a, int64_t p0, int64_t tile_rows, const Copy& copy) {
    const int64_t h0 = p0 * a.stride_h - a.pad_top;
    if (window_.rolling) {
      fetch(h0, (tile_rows - 1) * a.stride_h + (a.R - 1) * a.dilation_h + 1, a.H, copy);
    } else {
      fetch_scattered(a, h0, tile_rows, copy);
    }
  }

 private:
  LineWindow window_;
  int64_t size_;
  T *zeros_, *ring_;
  int64_t* missing_;
  T** to_;
  int64_t next_ = INT64_MIN;  // rows from here on are not in the ring
};

// --- vectors along the row (NCHW): a line is [column modulo stride][column / stride], so that neighbouring outputs read
// neighbours

template <class T>
struct RowBlocks {
  int64_t q_size, q_blocks;
  int64_t columns;  // of one residue
  LineWindow window;

  FC_INLINE RowBlocks(const Conv2dProblem& a, int64_t tile_rows) : window(a, tile_rows) {
    constexpr int64_t kL = kLanes<T>;
    const int64_t tail = ((a.S - 1) * a.dilation_w) / a.stride_w;
    const int64_t line_elements = kLineBytes / int64_t(sizeof(T)) / (window.slots * a.stride_w);
    int64_t most_q = (line_elements - tail) / kL * kL;
    most_q = most_q < 2 * kL ? 2 * kL : most_q;
    q_blocks = (a.Q + most_q - 1) / most_q;
    q_size = round_up((a.Q + q_blocks - 1) / q_blocks, kL);
    q_blocks = (a.Q + q_size - 1) / q_size;
    columns = round_up(q_size + tail, kL);
  }
  FC_INLINE int64_t line_size(const Conv2dProblem& a) const { return columns * a.stride_w; }
  // Where in a line the input of tap s for the block's first output is.
  FC_INLINE int64_t offset(const Conv2dProblem& a, int64_t s) const {
    return s * a.dilation_w % a.stride_w * columns + s * a.dilation_w / a.stride_w;
  }
};

// Copies the rows h[i] of one channel from column w0 on to to[i]. Rows are the inner loop, because which lanes of a vector exist
// is the same for all of them.
template <class T>
FC_INLINE void copy_rows(const Conv2dProblem& a, const T* x, const int64_t* h, T* const* to, int64_t count, int64_t w0,
                         int64_t columns) {
  constexpr int64_t kL = kLanes<T>;
  if (a.x.w != 1 || a.stride_w > 2) {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t residue = 0; residue < a.stride_w; ++residue) {
        for (int64_t j = 0; j < columns; ++j) {
          const int64_t w = w0 + j * a.stride_w + residue;
          to[i][residue * columns + j] = w >= 0 && w < a.W ? x[h[i] * a.x.h + w * a.x.w] : T(0);
        }
      }
    }
    return;
  }
  const int64_t row = a.x.h;
  const auto first = [&](int64_t w) { return int(clamp(-w, 0, kL)); };
  const auto last = [&](int64_t w) { return int(clamp(a.W - w, 0, kL)); };
  for (int64_t j = 0; j < columns; j += kL) {
    const int64_t w = w0 + j * a.stride_w;
    const T* from = x + w;
    const int lo = first(w), hi = last(w);
    if (a.stride_w == 2) {
      const int lo2 = first(w + kL), hi2 = last(w + kL);
      for (int64_t i = 0; i < count; ++i) {
        vec<T> even, odd;
        deinterleave(load_range(from + h[i] * row, lo, hi), load_range(from + h[i] * row + kL, lo2, hi2), even, odd);
        store(to[i] + j, even);
        store(to[i] + columns + j, odd);
      }
    } else if (lo == 0 && hi == kL) {
      for (int64_t i = 0; i < count; ++i) store(to[i] + j, load(from + h[i] * row));
    } else if (lo < hi) {
      for (int64_t i = 0; i < count; ++i) store(to[i] + j, load_range(from + h[i] * row, lo, hi));
    } else {
      for (int64_t i = 0; i < count; ++i) store(to[i] + j, zero<T>());
    }
  }
}

}  // namespace fastconv::FASTCONV_TARGET

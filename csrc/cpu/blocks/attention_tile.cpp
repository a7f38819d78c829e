#include "cpu/blocks/attention_tile.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// Depths from a load of b to its prefetch (gemm_tile.cpp), and depths in a turn of the loop. The loop over one depth had 47
// operations for 24 FMAs, which four a cycle just feed; four depths in a turn have 39 each, and a loop of 64 features ends after
// 16 turns, which the branch predictor knows.
constexpr int64_t kAhead = 4;
constexpr int kTurn = 2;

// One pointer that moves on. The compiler would rather keep one for each place, on the stack: there are 16 registers.
template <class T>
FC_INLINE void step_by(T*& p, int64_t step) {
  p += step;
  asm("" : "+r"(p));
}

template <class T, int kVectors>
struct Sums {
  static constexpr int kRows = Strip<T>::kRows;
  vec<T> at[kRows][kVectors];

  FC_INLINE Sums(const T* const (&rows)[kRows], const T* b, int64_t b_step, int64_t depth) {
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) at[m][v] = zero<T>();
    }
    const int64_t whole = depth / kTurn * kTurn;
    int64_t d = 0;
    for (; d < whole; d += kTurn) {
#pragma GCC unroll 4
      for (int u = 0; u < kTurn; ++u) {
        add(rows, d + u, b, b_step);
        step_by(b, b_step);
      }
    }
    for (; d < depth; ++d, b += b_step) add(rows, d, b, b_step);
  }

  FC_INLINE void store_at(T* to, int64_t row) const {
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m, step_by(to, row)) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) store(to + v * kLanes<T>, at[m][v]);
    }
  }

 private:
  FC_INLINE void add(const T* const (&rows)[kRows], int64_t d, const T* b, int64_t b_step) {
    vec<T> panel[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      panel[v] = load(b + v * kLanes<T>);
      __builtin_prefetch(b + kAhead * b_step + v * kLanes<T>);
    }
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      const vec<T> row = set1(rows[m][d]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) at[m][v] = fma(row, panel[v], at[m][v]);
    }
  }
};

template <class T, int kVectors>
void scores(const Strip<T> in, int64_t panels, T* s, int64_t s_row, T* most) {
  constexpr int kRows = Strip<T>::kRows;
  const T* rows[kRows];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) rows[m] = in.a + m * in.a_row;
  const T* b = in.b;
  for (int64_t panel = 0; panel < panels; ++panel, b += in.depth * in.b_step, s += kVectors * kLanes<T>) {
    const Sums<T, kVectors> sums(rows, b, in.b_step, in.depth);
    sums.store_at(s, s_row);
    if (!most) continue;
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      vec<T> largest = load(most + m * kLanes<T>);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) largest = max(sums.at[m][v], largest);
      store(most + m * kLanes<T>, largest);
    }
  }
}

template <class T, int kVectors>
void values(const Strip<T> in, T* out, int64_t out_row, const T* shrink) {
  constexpr int kRows = Strip<T>::kRows;
  const T* rows[kRows];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) rows[m] = in.a + m * in.a_row;
  // What is there comes from the L2, and is needed when the sums are done.
  if (shrink) {
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) __builtin_prefetch(out + m * out_row + v * kLanes<T>, 1);
    }
  }
  Sums<T, kVectors> sums(rows, in.b, in.b_step, in.depth);
  if (shrink) {
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      const vec<T> factor = set1(shrink[m]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        sums.at[m][v] = fma(load(out + m * out_row + v * kLanes<T>), factor, sums.at[m][v]);
      }
    }
  }
  sums.store_at(out, out_row);
}

}  // namespace

template <class T>
void score_strip(int vectors, const Strip<T>& in, int64_t panels, T* s, int64_t s_row, T* most) {
  if (vectors == 1) return scores<T, 1>(in, panels, s, s_row, most);
  if (vectors == 2) return scores<T, 2>(in, panels, s, s_row, most);
  if constexpr (Strip<T>::kVectors == 4) {
    if (vectors == 4) return scores<T, 4>(in, panels, s, s_row, most);
  }
  return scores<T, 3>(in, panels, s, s_row, most);
}

template <class T>
void value_strip(int vectors, const Strip<T>& in, T* out, int64_t out_row, const T* shrink) {
  if (vectors == 1) return values<T, 1>(in, out, out_row, shrink);
  if (vectors == 2) return values<T, 2>(in, out, out_row, shrink);
  if constexpr (Strip<T>::kVectors == 4) {
    if (vectors == 4) return values<T, 4>(in, out, out_row, shrink);
  }
  return values<T, 3>(in, out, out_row, shrink);
}

template void score_strip(int, const Strip<float>&, int64_t, float*, int64_t, float*);
template void score_strip(int, const Strip<double>&, int64_t, double*, int64_t, double*);
template void value_strip(int, const Strip<float>&, float*, int64_t, const float*);
template void value_strip(int, const Strip<double>&, double*, int64_t, const double*);

}  // namespace fastconv::FASTCONV_TARGET

// Tiles of attention's products on the tensor cores, for bf16 and f16: what a block of four warps holds in shared memory, and the
// two products, each warp's in its registers.
//
//   weights = fixed * moving'   64 x kN, over features        both operands as they lie (ldmatrix)
//   sums   += weights * moving  64 x features, over kN        the moving tile transposed on its way (ldmatrix.trans)
//
// The weights of the first product are the fragments that the second one multiplies: they never leave their registers.
#pragma once

#include "cuda/blocks/attention.h"
#include "cuda/blocks/copy.h"
#include "cuda/blocks/mma.h"

namespace fastconv::sm80 {

// kFixed tiles of 64 rows stay while kMoving tiles of kN rows go by in two stages: one is multiplied while the next is on its
// way. Rows have kWidth features, those that an operand has not being zeros.
template <class Stored, int kWidth, int kN_, int kFixed, int kMoving>
class TensorTiles {
 public:
  using T = Stored;
  static constexpr int kM = 64, kN = kN_, kThreads = 128;
  static constexpr int kRows = 2, kColumns = kN / 4, kFeatures = kWidth / 4;  // of a thread
  static constexpr int kSharers = 4;                                          // neighbouring lanes with the same rows
  static_assert(kM / 16 * kWarp == kThreads && kN % 16 == 0 && kWidth % 64 == 0);

  struct Shared {
    alignas(128) T fixed[kFixed][kM * kWidth];
    T moving[2][kMoving][kN * kWidth];
  };
  // c[2 (row / 8) + column % 2] of the tile of 8 columns that it belongs to, as mma.h lays out C.
  struct Weights {
    float v[kN / 8][4] = {};
    FC_DEVICE float& at(int r, int c) { return v[c / 2][2 * r + c % 2]; }
  };
  struct Sums {
    float v[kWidth / 8][4] = {};
    FC_DEVICE float& at(int r, int c) { return v[c / 2][2 * r + c % 2]; }
  };
  FC_DEVICE static int row(int r) { return warp() * 16 + lane() / 4 + r * 8; }
  FC_DEVICE static int column(int c) { return c / 2 * 8 + lane() % 4 * 2 + c % 2; }
  FC_DEVICE static int feature(int c) { return column(c); }

  FC_DEVICE TensorTiles(Shared& shared, const UnitRows<const T>* fixed, int first_fixed, const UnitRows<const T>* moving)
      : shared_(shared), moving_(moving) {
    FC_UNROLL
    for (int i = 0; i < kFixed; ++i) {
      bring<kM>(shared.fixed[i], fixed[i], first_fixed);
      steps_[i] = (fixed[i].features + 15) / 16;
    }
  }

  // Starts to bring the moving tiles from row `first` on.
  FC_DEVICE void start(int first, int stage) {
    FC_UNROLL
    for (int i = 0; i < kMoving; ++i) bring<kN>(shared_.moving[stage][i], moving_[i], first);
  }
  // Before a barrier after which everybody's part of all that was started is there.
  FC_DEVICE static void arrive() {
    close_copies();
    wait_for_copies<0>();
  }

  // weights = fixed tile * moving tile'.
  FC_DEVICE void multiply(Weights& weights, int fixed, int moving, int, int stage) const {
    const T *m = shared_.fixed[fixed], *n = shared_.moving[stage][moving];
    weights = Weights();
    for (int k = 0; k < 2 * steps_[fixed]; k += 2) {  // 16 features are two chunks
      uint32_t a[4];
      load_matrices(a, m + swizzled(warp() * 16 + lane() % 16, k + lane() / 16));
      FC_UNROLL
      for (int j = 0; j < kN / 16; ++j) {
        uint32_t b[4];
        load_matrices(b, n + swizzled(j * 16 + lane() % 8 + lane() / 16 * 8, k + lane() / 8 % 2));
        multiply_add<T>(weights.v[2 * j], a, {b[0], b[1]});
        multiply_add<T>(weights.v[2 * j + 1], a, {b[2], b[3]});
      }
    }
  }

  // sums += weights, rounded to T, * moving tile.
  FC_DEVICE void accumulate(Sums& sums, const Weights& weights, int moving, int, int stage) const {
    const T* x = shared_.moving[stage][moving];
    FC_UNROLL
    for (int k = 0; k < kN / 16; ++k) {
      uint32_t a[4];
      fragment(a, weights, k);
      FC_UNROLL
      for (int j = 0; j < kWidth / 16; ++j) {
        if (j * 16 >= moving_[moving].features) break;
        uint32_t b[4];
        load_matrices_transposed(b, x + swizzled(k * 16 + lane() % 16, 2 * j + lane() / 16));
        multiply_add<T>(sums.v[2 * j], a, {b[0], b[1]});
        multiply_add<T>(sums.v[2 * j + 1], a, {b[2], b[3]});
      }
    }
  }

  // The same where rows of the tile hold infinities or NaN: row r takes part in no product with rows outside seen[r], counted
  // from the tile's first. One row at a time, the others' sums being dropped.
  FC_DEVICE void accumulate_seen(Sums& sums, const Weights& weights, int moving, int, int stage,
                                 const KeyRange (&seen)[kRows]) const {
    const T* x = shared_.moving[stage][moving];
    for (int only = 0; only < 16; ++only) {
      const int from = only % 8 * 4;
      const int begin = __shfl_sync(0xFFFFFFFFu, only < 8 ? seen[0].begin : seen[1].begin, from);
      const int end = __shfl_sync(0xFFFFFFFFu, only < 8 ? seen[0].end : seen[1].end, from);
      const bool upper = lane() / 4 == only, lower = lane() / 4 + 8 == only;
      FC_UNROLL
      for (int k = 0; k < kN / 16; ++k) {
        uint32_t a[4];
        fragment(a, weights, k);
        const int first = k * 16 + lane() % 4 * 2;  // of the rows that this lane has of B
        const uint32_t mask[2] = {visible(first, begin, end), visible(first + 8, begin, end)};
        FC_UNROLL
        for (int j = 0; j < kWidth / 16; ++j) {
          if (j * 16 >= moving_[moving].features) break;
          uint32_t b[4];
          load_matrices_transposed(b, x + swizzled(k * 16 + lane() % 16, 2 * j + lane() / 16));
          FC_UNROLL
          for (int half = 0; half < 2; ++half) {
            float (&sum)[4] = sums.v[2 * j + half];
            float c[4] = {sum[0], sum[1], sum[2], sum[3]};
            multiply_add<T>(c, a, {b[2 * half] & mask[0], b[2 * half + 1] & mask[1]});
            sum[0] = upper ? c[0] : sum[0], sum[1] = upper ? c[1] : sum[1];
            sum[2] = lower ? c[2] : sum[2], sum[3] = lower ? c[3] : sum[3];
          }
        }
      }
    }
  }

  // Whether this thread found an infinity or NaN in its part of a moving tile.
  FC_DEVICE bool found_infinite(int moving, int, int stage) const {
    const T* x = shared_.moving[stage][moving];
    bool found = false;
    for (int i = int(threadIdx.x); i < kN * kChunks; i += kThreads) {
      if (i % kChunks >= used(moving_[moving].features)) continue;
      const Pack<T, kChunk> chunk = load_pack<kChunk>(x + swizzled(i / kChunks, i % kChunks));
      FC_UNROLL
      for (int e = 0; e < kChunk; ++e) found = found || !is_finite(to_float(chunk.v[e]));
    }
    return found;
  }

 private:
  static constexpr int kChunk = 8, kChunks = kWidth / kChunk;  // halves of 16 bytes, and how many a row has

  FC_DEVICE static int lane() { return int(threadIdx.x) % kWarp; }
  FC_DEVICE static int warp() { return int(threadIdx.x) / kWarp; }
  // Where chunk `chunk` of row `row` lies. Rows are whole lines of all banks; exchanging chunks by the row's number puts the same
  // chunk of eight rows, which ldmatrix reads together, into eight different banks.
  FC_DEVICE static int swizzled(int row, int chunk) { return row * kWidth + (chunk ^ (row % 8)) * kChunk; }
  // Chunks of a row that products read: whole steps of 16 features.
  FC_DEVICE static int used(int features) { return (features + 15) / 16 * 2; }

  FC_DEVICE static void fragment(uint32_t (&a)[4], const Weights& weights, int k) {
    FC_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float (&c)[4] = weights.v[2 * k + i / 2];
      a[i] = pair_of<T>(c[i % 2 * 2], c[i % 2 * 2 + 1]);
    }
  }
  FC_DEVICE static uint32_t visible(int n, int begin, int end) {
    return (n >= begin && n < end ? 0xFFFFu : 0u) | (n + 1 >= begin && n + 1 < end ? 0xFFFF0000u : 0u);
  }

  // kCount rows from `first` on: asynchronous copies where they come in aligned packs, else element by element. What does not
  // exist is zeros.
  template <int kCount>
  FC_DEVICE static void bring(T* tile, const UnitRows<const T>& rows, int first) {
    constexpr int kAtOnce = kThreads / kChunks;
    const int chunk = int(threadIdx.x) % kChunks, d = chunk * kChunk;
    if (chunk >= used(rows.features)) return;
    for (int r = int(threadIdx.x) / kChunks; r < kCount; r += kAtOnce) {
      const bool exists = rows.has(first + r);
      const T* from = exists ? rows.at(first + r) + d * rows.feature : rows.p;
      T* to = tile + swizzled(r, chunk);
      if (rows.packs) {
        const bool whole = exists && d < rows.features;
        copy_async(to, whole ? from : rows.p, whole);
        continue;
      }
      Pack<T, kChunk> pack;
      FC_UNROLL
      for (int e = 0; e < kChunk; ++e) {
        pack.v[e] = exists && d + e < rows.features ? from[e * rows.feature] : from_float<T>(0);
      }
      store_pack(to, pack);
    }
  }

  Shared& shared_;
  const UnitRows<const T>* moving_;
  int steps_[kFixed];
};

}  // namespace fastconv::sm80

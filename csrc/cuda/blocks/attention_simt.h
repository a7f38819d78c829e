// Tiles of attention's products on the FMA units, in strict fp32 whatever is stored: the same two products as attention_tensor.h,
// by the tile of simt_gemm.h, which brings its slices of 16 features, or rows, by itself.
//
// The weights go through shared memory on their way from the first product to the second.
#pragma once

#include "cuda/blocks/attention.h"
#include "cuda/blocks/simt_gemm.h"

namespace fastconv::sm80 {

template <class Stored, int kWidth, int kFixed, int kMoving>
class SimtTiles {
  static constexpr int kOwn = SimtTile::kOwn, kTiles = kWidth / SimtTile::kN;  // tiles of 64 features

 public:
  using T = Stored;
  static constexpr int kM = SimtTile::kM, kN = SimtTile::kN, kThreads = SimtTile::kThreads;
  static constexpr int kRows = kOwn, kColumns = kOwn, kFeatures = kOwn * kTiles;  // of a thread
  static constexpr int kSharers = kN / kOwn;                                      // neighbouring lanes with the same rows
  static_assert(kWidth % SimtTile::kN == 0);

  struct Shared {
    SimtShared slice;
    float weights[kM][kN + 4];  // neighbouring rows begin in different banks
  };
  struct Weights {
    float v[kOwn][kOwn] = {};
    FC_DEVICE float& at(int r, int c) { return v[r][c]; }
  };
  struct Sums {
    float v[kTiles > 0 ? kTiles : 1][kOwn][kOwn] = {};
    FC_DEVICE float& at(int r, int c) { return v[c / kOwn][r][c % kOwn]; }
  };
  FC_DEVICE static int row(int r) { return own_m() + r; }
  FC_DEVICE static int column(int c) { return own_n() + c; }
  FC_DEVICE static int feature(int c) { return c / kOwn * SimtTile::kN + own_n() + c % kOwn; }

  FC_DEVICE SimtTiles(Shared& shared, const UnitRows<const T>* fixed, int first_fixed, const UnitRows<const T>* moving)
      : shared_(shared), fixed_(fixed), moving_(moving), first_fixed_(first_fixed) {}

  FC_DEVICE void start(int, int) {}
  FC_DEVICE static void arrive() {}

  FC_DEVICE void multiply(Weights& weights, int fixed, int moving, int first, int) const {
    weights = Weights();
    simt_multiply(shared_.slice, 0, uint32_t(fixed_[fixed].features), AlongFeatures(fixed_[fixed], first_fixed_),
                  AlongFeatures(moving_[moving], first), own_m(), own_n(), weights.v);
  }

  FC_DEVICE void accumulate(Sums& sums, const Weights& weights, int moving, int first, int) const {
    put(weights);
    multiply_put<false>(sums, moving, first);
  }

  // The same where rows of the tile hold infinities or NaN: row r takes part in no product with rows outside seen[r], counted
  // from the tile's first. Finite numbers are multiplied as ever, the others one by one.
  FC_DEVICE void accumulate_seen(Sums& sums, const Weights& weights, int moving, int first, int,
                                 const KeyRange (&seen)[kRows]) const {
    put(weights);
    multiply_put<true>(sums, moving, first);
    const UnitRows<const T>& rows = moving_[moving];
    for (int n = 0; n < kN && rows.has(first + n); ++n) {
      const T* x = rows.at(first + n);
      FC_UNROLL
      for (int c = 0; c < kFeatures; ++c) {
        if (feature(c) >= rows.features) continue;
        const float value = to_float(x[feature(c) * rows.feature]);
        if (is_finite(value)) continue;
        FC_UNROLL
        for (int r = 0; r < kRows; ++r) {
          if (n >= seen[r].begin && n < seen[r].end) sums.at(r, c) += shared_.weights[row(r)][n] * value;
        }
      }
    }
    __syncthreads();  // the next weights overwrite these
  }

  FC_DEVICE bool found_infinite(int moving, int first, int) const {
    const UnitRows<const T>& rows = moving_[moving];
    bool found = false;
    for (int i = int(threadIdx.x); i < kN * rows.features; i += kThreads) {
      const int n = first + i / rows.features;
      if (rows.has(n)) found = found || !is_finite(to_float(rows.at(n)[i % rows.features * rows.feature]));
    }
    return found;
  }

  // The block's weights as a matrix in shared memory, there for all threads; good until the next barrier of a product.
  FC_DEVICE void put(const Weights& weights) const {
    FC_UNROLL
    for (int r = 0; r < kRows; ++r) {
      FC_UNROLL
      for (int c = 0; c < kColumns; ++c) shared_.weights[row(r)][column(c)] = weights.v[r][c];
    }
    __syncthreads();
  }

 private:
  FC_DEVICE static int own_m() { return int(threadIdx.x) / (kN / kOwn) * kOwn; }
  FC_DEVICE static int own_n() { return int(threadIdx.x) % (kN / kOwn) * kOwn; }

  // Rows first .. first + 63 of an operand, reduced over features.
  struct AlongFeatures {
    SimtShare share;
    int64_t step;
    const T* rows[SimtTile::kLoads];
    bool exists[SimtTile::kLoads];

    FC_DEVICE AlongFeatures(const UnitRows<const T>& operand, int first)
        : share{operand.feature <= operand.position}, step(operand.feature) {
      FC_UNROLL
      for (int i = 0; i < SimtTile::kLoads; ++i) {
        const int r = first + share.row(i);
        exists[i] = operand.has(r);
        rows[i] = exists[i] ? operand.at(r) : operand.p;
      }
    }
    FC_DEVICE float load(int i, uint32_t d) const { return exists[i] ? to_float(rows[i][d * step]) : 0.0f; }
  };

  // What put() left, reduced over its columns.
  struct PutWeights {
    SimtShare share;
    const float (&weights)[kM][kN + 4];
    FC_DEVICE float load(int i, uint32_t n) const { return weights[share.row(i)][n]; }
  };

  // Features first_feature .. of an operand, reduced over its rows from `first` on.
  template <bool kFiniteOnly>
  struct AlongRows {
    const UnitRows<const T>& operand;
    SimtShare share;
    int first, first_feature;
    FC_DEVICE float load(int i, uint32_t n) const {
      const int d = first_feature + share.row(i), r = first + int(n);
      if (d >= operand.features || !operand.has(r)) return 0.0f;
      const float value = to_float(operand.at(r)[d * operand.feature]);
      return !kFiniteOnly || is_finite(value) ? value : 0.0f;
    }
  };

  template <bool kFiniteOnly>
  FC_DEVICE void multiply_put(Sums& sums, int moving, int first) const {
    const UnitRows<const T>& rows = moving_[moving];
    FC_UNROLL
    for (int i = 0; i < kTiles; ++i) {
      if (i * SimtTile::kN >= rows.features) break;
      simt_multiply(shared_.slice, 0, kN, PutWeights{{true}, shared_.weights},
                    AlongRows<kFiniteOnly>{rows, {rows.feature > rows.position}, first, i * SimtTile::kN}, own_m(), own_n(),
                    sums.v[i]);
    }
  }

  Shared& shared_;
  const UnitRows<const T>*fixed_, *moving_;
  int first_fixed_;
};

}  // namespace fastconv::sm80

// conv2d_fwd.skeleton: the kernel to copy (README.md here says how). Packs the weights, then computes a tile of pixels x filters
// with the filters in the lanes. Takes inputs and outputs whose channels lie side by side (channels_last), without groups.
//
// A kernel file opens with what the algorithm does, where its vectors run and what it takes. These five sections follow, always
// in this order: tile, transform, multiply, run, contract.
#include "cpu/blocks/activation.h"
#include "cpu/blocks/conv2d_geometry.h"
#include "cpu/blocks/parallel.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- tile: what stays in registers, with the arithmetic. kPixels outputs of one row p x kVectors vectors of filters.
//
// AVX-512: 12 x 2 accumulators + 2 weights + 1 broadcast input = 27 of 32 registers. Otherwise 6 x 2 + 2 + 1 = 15 of 16. Each
// weight load feeds kPixels FMAs, each broadcast kVectors.
constexpr int kVectors = 2;
constexpr int kPixels = kVectorRegisters == 32 ? 12 : 6;
static_assert(kPixels * kVectors + kVectors + 1 <= kVectorRegisters);

// Filters of one tile: also the width of a packed row.
template <class T>
constexpr int kFilters = kVectors * kLanes<T>;

template <class T>
struct Tile {
  vec<T> sum[kPixels][kVectors];
};

// --- transform: what is rearranged before the arithmetic, and into what shape.
//
// packed[block][r][s][c][kFilters], so that the inner loop reads weights from one end to the other. Lanes past K hold zero: they
// are computed and not stored, which costs less than a second loop.
template <class T>
FC_INLINE int64_t packed_size(const Conv2dProblem& a) {
  return ceil_div(a.K, kFilters<T>) * kFilters<T> * a.R * a.S * a.C;
}

template <class T>
void pack_tap(const Conv2dProblem& a, const T* w, T* packed, int64_t block, int64_t r, int64_t s) {
  const int64_t k0 = block * kFilters<T>;
  T* out = packed + ((block * a.R + r) * a.S + s) * a.C * kFilters<T>;
  for (int64_t c = 0; c < a.C; ++c, out += kFilters<T>) {
    const T* in = w + k0 * a.w.k + c * a.w.c + r * a.w.r + s * a.w.s;
    for (int v = 0; v < kVectors; ++v) {
      const int64_t left = a.K - k0 - v * kLanes<T>;
      const int lanes = int(clamp(left, 0, kLanes<T>));
      // The address is only formed where there is a filter to read.
      store(out + v * kLanes<T>, lanes ? load_strided(in + v * kLanes<T> * a.w.k, a.w.k, lanes) : zero<T>());
    }
  }
}

// --- multiply: the inner loops of one tile.
//
// The order of the sum (r, s, c) depends on nothing but the problem: a pixel has the same bits in any batch and on any thread. A
// pixel whose tap lies in the padding is pointed at `zeros` (C of them), so that the inner loop has no branch.
template <class T>
Tile<T> multiply(const Conv2dProblem& a, const T* x, const T* zeros, const T* packed, int64_t p, int64_t q0, int pixels) {
  Tile<T> tile;
  for (auto& pixel : tile.sum) {
    for (auto& sum : pixel) sum = zero<T>();
  }
  for (int64_t r = 0; r < a.R; ++r) {
    const int64_t h = p * a.stride_h - a.pad_top + r * a.dilation_h;
    if (h < 0 || h >= a.H) continue;
    for (int64_t s = 0; s < a.S; ++s) {
      const T* in[kPixels];
      for (int i = 0; i < kPixels; ++i) {
        // Pixels past the end of the row repeat the last one and are not stored.
        const int64_t q = q0 + (i < pixels ? i : pixels - 1);
        const int64_t column = q * a.stride_w - a.pad_left + s * a.dilation_w;
        in[i] = column >= 0 && column < a.W ? x + h * a.x.h + column * a.x.w : zeros;
      }
      const T* weights = packed + (r * a.S + s) * a.C * kFilters<T>;
      for (int64_t c = 0; c < a.C; ++c, weights += kFilters<T>) {
        vec<T> weight[kVectors];
        for (int v = 0; v < kVectors; ++v) weight[v] = load(weights + v * kLanes<T>);
#pragma GCC unroll 12
        for (int i = 0; i < kPixels; ++i) {
          const vec<T> input = set1(in[i][c]);
          for (int v = 0; v < kVectors; ++v) tile.sum[i][v] = fma(input, weight[v], tile.sum[i][v]);
        }
      }
    }
  }
  return tile;
}

// Bias, residual and activation are applied here, before the only store of each output.
template <class T>
void store_tile(const Conv2dProblem& a, const Conv2dArgs& args, const Tile<T>& tile, int64_t k0, int64_t y_offset, int pixels) {
  for (int v = 0; v < kVectors; ++v) {
    const int64_t k = k0 + v * kLanes<T>;
    if (k >= a.K) break;
    const int lanes = int(clamp(a.K - k, 0, kLanes<T>));
    const vec<T> bias = a.epilogue.bias ? load(static_cast<const T*>(args.bias) + k, lanes) : zero<T>();
    for (int i = 0; i < pixels; ++i) {
      const int64_t offset = y_offset + i * a.y.w + k;
      vec<T> y = tile.sum[i][v] + bias;
      if (a.epilogue.residual) y = y + load(static_cast<const T*>(args.residual) + offset, lanes);
      store(static_cast<T*>(args.y) + offset, activate(a.epilogue.activation, y), lanes);
    }
  }
}

// --- run: the loop nest. What a thread shares out are outputs, never parts of one sum.
template <class T>
void run(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context) {
  T* packed = static_cast<T*>(context.workspace);
  T* zeros = packed + packed_size<T>(a);
  for (int64_t c = 0; c < a.C; ++c) zeros[c] = 0;
  const int64_t blocks = ceil_div(a.K, kFilters<T>);
  parallel_ranges(context, blocks * a.R * a.S, [&](int, int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      pack_tap(a, static_cast<const T*>(args.w), packed, task / a.S / a.R, task / a.S % a.R, task % a.S);
    }
  });
  // Rows run fastest: the weights of one block stay in the cache while the rows of all images pass by.
  const int64_t rows = a.N * a.P;
  parallel_ranges(context, blocks * rows, [&](int, int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task / rows, n = task % rows / a.P, p = task % a.P;
      const T* x = static_cast<const T*>(args.x) + n * a.x.n;
      const T* weights = packed + block * a.R * a.S * a.C * kFilters<T>;
      for (int64_t q = 0; q < a.Q; q += kPixels) {
        const int pixels = int(clamp(a.Q - q, 0, kPixels));
        const int64_t y_offset = n * a.y.n + p * a.y.h + q * a.y.w;
        store_tile(a, args, multiply(a, x, zeros, weights, p, q, pixels), block * kFilters<T>, y_offset, pixels);
      }
    }
  });
}

// --- contract: what the kernel takes (one sentence if not), what it would cost, what it needs; then the constant.
const char* reject(const Conv2dProblem& a) {
  if (a.groups != 1) return "takes no groups";
  if (a.x.c != 1 || a.y.c != 1) return "channels do not lie side by side";
  return nullptr;
}

template <class T>
double cost(const Conv2dProblem& a, const Machine& machine) {
  // The share of the tile that holds real pixels and filters, times what a full tile was measured to reach.
  const double pixels = double(ceil_div(a.Q, kPixels) * kPixels), filters = double(ceil_div(a.K, kFilters<T>) * kFilters<T>);
  const double fill = double(a.Q) / pixels * (double(a.K) / filters);
  constexpr double kMeasured = 0.5;
  return conv2d_flops(a) / (peak_flops<T>(machine) * kMeasured * fill);
}

template <class T>
int64_t workspace(const Conv2dProblem& a, const Machine&) {
  return (packed_size<T>(a) + a.C) * int64_t(sizeof(T));
}

template <class T>
constexpr Kernel<Conv2dProblem> kKernel = {1.0f, reject, cost<T>, workspace<T>, run<T>};

}  // namespace

extern constinit const Kernel<Conv2dProblem> conv2d_fwd_skeleton_f32 = kKernel<float>;
extern constinit const Kernel<Conv2dProblem> conv2d_fwd_skeleton_f64 = kKernel<double>;

}  // namespace fastconv::FASTCONV_TARGET

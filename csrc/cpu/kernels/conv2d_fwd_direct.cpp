// conv2d_fwd.direct: reads x, w and y where they lie, whatever their strides, needs no workspace, and takes every problem.
//
// It is the kernel that the others may refuse work to. On dense NCHW rows it is a fair kernel too: vectors run along the output
// row.
#include "cpu/blocks/activation.h"
#include "cpu/blocks/conv2d_geometry.h"
#include "cpu/blocks/parallel.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- tile: kRows filters x kVectors vectors of output columns of one row p.
//
// 4 x 2 accumulators + 2 inputs + 1 broadcast weight = 11 registers, under the 16 of AVX2; 8 independent chains hide the latency
// of 4 cycles on two FMA ports. Six loads for eight FMAs.
constexpr int kRows = 4;
constexpr int kVectors = 2;

template <class T>
struct Tile {
  vec<T> sum[kRows][kVectors];
};

// --- transform: nothing is packed. Lanes of vector v that meet padding are zero.
template <class T>
FC_INLINE vec<T> load_columns(const T* x, int64_t step, int64_t first, int64_t last) {
  constexpr int kL = kLanes<T>;
  const int lo = first < 0 ? 0 : first > kL ? kL : int(first), hi = last < 0 ? 0 : last > kL ? kL : int(last);
  if (step == 1) return lo == 0 && hi == kL ? load(x) : load_range(x, lo, hi);
  vec<T> r = zero<T>();
  for (int i = lo; i < hi; ++i) r.v[i] = x[i * step];
  return r;
}

// --- multiply: all taps and channels of one tile. Rows of the tile past `rows` repeat the last filter and are not stored.
template <class T>
Tile<T> multiply(const Conv2dProblem& a, const T* x, const T* w, int rows, int64_t p, int64_t q0) {
  Tile<T> tile;
  for (auto& row : tile.sum) {
    for (auto& sum : row) sum = zero<T>();
  }
  const Range taps = taps_inside(a.R, a.dilation_h, p * a.stride_h - a.pad_top, a.H);
  const int64_t step = a.stride_w * a.x.w;
  for (int64_t c = 0; c < a.C / a.groups; ++c) {
    for (int64_t r = taps.begin; r < taps.end; ++r) {
      const T* x_row = x + c * a.x.c + (p * a.stride_h - a.pad_top + r * a.dilation_h) * a.x.h;
      for (int64_t s = 0; s < a.S; ++s) {
        const int64_t offset = s * a.dilation_w - a.pad_left;  // of the column that q = 0 reads
        const Range columns = outputs_inside(a.Q, a.stride_w, offset, a.W);
        vec<T> in[kVectors];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
          const int64_t q = q0 + v * kLanes<T>;
          in[v] = load_columns(x_row + (q * a.stride_w + offset) * a.x.w, step, columns.begin - q, columns.end - q);
        }
        const T* w_tap = w + c * a.w.c + r * a.w.r + s * a.w.s;
#pragma GCC unroll 4
        for (int m = 0; m < kRows; ++m) {
          const vec<T> weight = set1(w_tap[(m < rows ? m : rows - 1) * a.w.k]);
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) tile.sum[m][v] = fma(weight, in[v], tile.sum[m][v]);
        }
      }
    }
  }
  return tile;
}

template <class T>
void store_tile(const Conv2dProblem& a, const Conv2dArgs& args, const Tile<T>& tile, int rows, int64_t k0, int64_t y_offset,
                int64_t q0) {
  for (int m = 0; m < rows; ++m) {
    for (int v = 0; v < kVectors; ++v) {
      const int64_t q = q0 + v * kLanes<T>;
      if (q >= a.Q) break;
      const int n = int(a.Q - q < kLanes<T> ? a.Q - q : kLanes<T>);
      const int64_t offset = y_offset + m * a.y.c + q * a.y.w;
      vec<T> y = tile.sum[m][v];
      if (a.epilogue.bias) y = y + set1(static_cast<const T*>(args.bias)[k0 + m]);
      if (a.epilogue.residual) y = y + load_strided(static_cast<const T*>(args.residual) + offset, a.y.w, n);
      y = activate(a.epilogue.activation, y);
      T* out = static_cast<T*>(args.y) + offset;
      if (a.y.w == 1) {
        store(out, y, n);
      } else {
        store_strided(out, a.y.w, y, n);
      }
    }
  }
}

// --- run: one task is kRows filters of one group over one output row.
template <class T>
void run(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context) {
  const int64_t filters = a.K / a.groups, blocks = (filters + kRows - 1) / kRows;
  parallel_ranges(context, a.N * a.groups * blocks * a.P, [&](int, int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t p = task % a.P, block = task / a.P % blocks, g = task / a.P / blocks % a.groups,
                    n = task / a.P / blocks / a.groups;
      const int64_t k_in_group = block * kRows, k = g * filters + k_in_group;
      const int rows = int(filters - k_in_group < kRows ? filters - k_in_group : kRows);
      const T* x = static_cast<const T*>(args.x) + n * a.x.n + g * (a.C / a.groups) * a.x.c;
      const T* w = static_cast<const T*>(args.w) + g * a.w.g + k_in_group * a.w.k;
      for (int64_t q = 0; q < a.Q; q += kVectors * kLanes<T>) {
        store_tile(a, args, multiply(a, x, w, rows, p, q), rows, k, n * a.y.n + k * a.y.c + p * a.y.h, q);
      }
    }
  });
}

// --- contract
const char* reject(const Conv2dProblem&) { return nullptr; }

template <class T>
double cost(const Conv2dProblem& a, const Machine& machine) {
  // Measured on NCHW rows: half of the FMA peak when a row fills the tile; a strided row is read lane by lane. Finding the
  // columns of a tap inside the input takes as long as some forty FMAs, and a group of one filter computes all four rows of the
  // tile.
  const double tile_columns = kVectors * kLanes<T>;
  const double fill = double(a.Q) / (double((a.Q + int64_t(tile_columns) - 1) / int64_t(tile_columns)) * tile_columns);
  const int64_t filters = a.K / a.groups, blocks = (filters + kRows - 1) / kRows, columns = (a.Q + int64_t(tile_columns) - 1);
  const double efficiency = (a.x.w * a.stride_w == 1 ? 0.5 : 0.06) * fill * double(filters) / double(blocks * kRows);
  const double taps = double(a.N * a.groups * blocks * a.P) * double(columns / int64_t(tile_columns)) * double(a.C / a.groups) *
                      double(a.R * a.S);
  return conv2d_flops(a) / (peak_flops<T>(machine) * efficiency) + taps * 1e-8 / machine.threads;
}

int64_t workspace(const Conv2dProblem&, const Machine&) { return 0; }

template <class T>
constexpr Kernel<Conv2dProblem> kKernel = {1.0f, reject, cost<T>, workspace, run<T>};

}  // namespace

extern constinit const Kernel<Conv2dProblem> conv2d_fwd_direct_f32 = kKernel<float>;
extern constinit const Kernel<Conv2dProblem> conv2d_fwd_direct_f64 = kKernel<double>;

}  // namespace fastconv::FASTCONV_TARGET

// conv2d_wgrad.direct: an implicit GEMM on the FMA units, in strict fp32. Takes every problem, in any strides.
//
// The sum over images and pixels is cut into parts of a length that the problem's shape fixes. Each part is summed by one block,
// and a second kernel adds the parts in order, so the bits depend on the problem alone.
#include "cuda/blocks/conv2d.h"
#include "cuda/blocks/parts.h"
#include "cuda/blocks/simt_gemm.h"

namespace fastconv::sm80 {
namespace {

// --- tile: gemm_m = 64 filters of one group, gemm_n = 64 filter elements in the order r, s, c (blocks/simt_gemm.h). One more
// column than there are elements, of ones, is the bias's gradient.
constexpr int kOwn = SimtTile::kOwn;

struct Divisors {
  Divisor p, q;                     // reduction to n, p, q
  Divisor c, s;                     // columns to r, s, c
  Divisor tiles_m, tiles_n, parts;  // blocks to group, filters, elements, part
};

// What one block sums.
struct Extent {
  uint32_t pixels, part;      // of the whole reduction, and of one part
  uint32_t filters, columns;  // of a group
};

// --- transform: none of y; x is gathered.
template <class T>
struct Gradients {
  const Conv2dProblem& a;
  const Divisors& by;
  SimtShare share;
  const T* y;
  uint32_t first, filters;

  FC_DEVICE float load(int i, uint32_t d) const {
    const uint32_t k = first + uint32_t(share.row(i));
    if (k >= filters) return 0.0f;
    const int64_t q = by.q.take(d), p = by.p.take(d);
    return to_float(y[d * a.y.n + k * a.y.c + p * a.y.h + q * a.y.w]);
  }
};

template <class T>
struct Inputs {
  const Conv2dProblem& a;
  const Divisors& by;
  SimtShare share;
  const T* columns[SimtTile::kLoads];
  int64_t top[SimtTile::kLoads], left[SimtTile::kLoads];
  bool ones[SimtTile::kLoads];

  FC_DEVICE Inputs(const Conv2dProblem& a, const Divisors& by, const T* x, uint32_t first, uint32_t elements)
      : a(a), by(by), share{!(a.x.c == 1 && a.C > a.groups)} {
    FC_UNROLL
    for (int i = 0; i < SimtTile::kLoads; ++i) {
      uint32_t r = first + uint32_t(share.row(i));
      ones[i] = r == elements;
      const bool exists = r < elements;
      const int64_t c = by.c.take(r), s = by.s.take(r);
      columns[i] = x + c * a.x.c;
      top[i] = exists ? int64_t(r) * a.dilation_h - a.pad_top : INT32_MIN;
      left[i] = s * a.dilation_w - a.pad_left;
    }
  }
  FC_DEVICE float load(int i, uint32_t d) const {
    if (ones[i]) return 1.0f;
    const int64_t q = by.q.take(d), p = by.p.take(d);
    const int64_t h = top[i] + p * a.stride_h, w = left[i] + q * a.stride_w;
    return h >= 0 && h < a.H && w >= 0 && w < a.W ? to_float(columns[i][d * a.x.n + h * a.x.h + w * a.x.w]) : 0.0f;
  }
};

// --- multiply: simt_multiply.

// --- run: parts are (part, k, column).
template <class T>
__global__ void __launch_bounds__(SimtTile::kThreads)
    direct(Conv2dProblem a, Divisors by, Extent extent, const T* x, const T* y, float* parts) {
  uint32_t g = blockIdx.x;
  const uint32_t part = by.parts.take(g), n = by.tiles_n.take(g) * SimtTile::kN, m = by.tiles_m.take(g) * SimtTile::kM;
  const uint32_t begin = part * extent.part, rest = extent.pixels - begin, count = rest < extent.part ? rest : extent.part;
  const int own_m = int(threadIdx.x) / 16 * kOwn, own_n = int(threadIdx.x) % 16 * kOwn;
  const uint32_t elements = extent.columns - (a.epilogue.bias ? 1 : 0);
  float sum[kOwn][kOwn] = {};
  simt_multiply(shared_memory<SimtShared>(), begin, begin + count,
                Gradients<T>{a, by, {a.y.w < a.y.c}, y + int64_t(g) * extent.filters * a.y.c, m, extent.filters},
                Inputs<T>(a, by, x + g * (a.C / a.groups) * a.x.c, n, elements), own_m, own_n, sum);
  FC_UNROLL
  for (int i = 0; i < kOwn; ++i) {
    const uint32_t k = m + uint32_t(own_m + i);
    if (k >= extent.filters) break;
    float* row = parts + (int64_t(part) * a.K + int64_t(g) * extent.filters + k) * extent.columns;
    FC_UNROLL
    for (int j = 0; j < kOwn; ++j) {
      if (n + uint32_t(own_n + j) < extent.columns) row[n + own_n + j] = sum[i][j];
    }
  }
}

struct Cut {
  int64_t tiles_m, tiles_n, parts;
  Extent extent;
};

Cut cut(const Conv2dProblem& a) {
  const int64_t pixels = a.N * a.P * a.Q, filters = a.K / a.groups, columns = filter_columns(a);
  const int64_t tiles_m = ceil_div(filters, SimtTile::kM), tiles_n = ceil_div(columns, SimtTile::kN);
  const int64_t part = part_length(a, tiles_m * tiles_n * a.groups, SimtTile::kDepth);
  return {tiles_m, tiles_n, ceil_div(pixels, part),
          Extent{uint32_t(pixels), uint32_t(part), uint32_t(filters), uint32_t(columns)}};
}

template <class T>
void run(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context) {
  const Cut c = cut(a);
  const Divisors by = {Divisor::by(a.P),       Divisor::by(a.Q),       Divisor::by(a.C / a.groups), Divisor::by(a.S),
                       Divisor::by(c.tiles_m), Divisor::by(c.tiles_n), Divisor::by(c.parts)};
  launch(context, direct<T>, c.parts * c.tiles_m * c.tiles_n * a.groups, SimtTile::kThreads, sizeof(SimtShared), a, by, c.extent,
         static_cast<const T*>(args.x), static_cast<const T*>(args.y), static_cast<float*>(context.workspace));
  add_parts<T>(a, args, context, c.parts);
}

// --- contract
// As conv2d_fwd.direct.
double cost(const Conv2dProblem& a, const Machine&) {
  const Cut c = cut(a);
  const double filled = double(c.tiles_m * c.tiles_n * a.groups) * SimtTile::kM * SimtTile::kN;
  return conv2d_flops(a) * filled / double(a.K * filter_columns(a)) / 8e12;
}

int64_t workspace(const Conv2dProblem& a, const Machine&) { return parts_bytes(a, cut(a).parts); }

template <class T>
constexpr Kernel<Conv2dProblem> kKernel = {1.0f, parts_reject, cost, workspace, run<T>};

}  // namespace

extern constinit const Kernel<Conv2dProblem> conv2d_wgrad_direct_f32 = kKernel<float>;
extern constinit const Kernel<Conv2dProblem> conv2d_wgrad_direct_f16 = kKernel<__half>;
extern constinit const Kernel<Conv2dProblem> conv2d_wgrad_direct_bf16 = kKernel<__nv_bfloat16>;

}  // namespace fastconv::sm80

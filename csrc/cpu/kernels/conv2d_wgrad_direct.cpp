// conv2d_wgrad.direct: reads x and y where they lie, whatever their strides, needs no workspace, and takes every problem.
#include "cpu/blocks/bias_gradient.h"
#include "cpu/blocks/conv2d_geometry.h"
#include "cpu/blocks/parallel.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- tile: one vector of partial sums, whose lanes are every kLanes-th output column.

// --- transform: nothing is packed.
template <class T>
FC_INLINE vec<T> load_columns(const T* row, int64_t step, int count) {
  return step == 1 ? load(row, count) : load_strided(row, step, count);
}

// --- multiply: one filter element. Lanes are summed row by row, so that the error grows with a row's length and not with the
// image.
template <class T>
T multiply(const Conv2dProblem& a, const T* x, const T* y, int64_t r, int64_t s) {
  const int64_t offset = s * a.dilation_w - a.pad_left;  // of the column that q = 0 reads
  const Range columns = outputs_inside(a.Q, a.stride_w, offset, a.W);
  const Range rows = outputs_inside(a.P, a.stride_h, r * a.dilation_h - a.pad_top, a.H);
  T total = T(0);
  for (int64_t n = 0; n < a.N; ++n) {
    for (int64_t p = rows.begin; p < rows.end; ++p) {
      const T* x_row = x + n * a.x.n + (p * a.stride_h - a.pad_top + r * a.dilation_h) * a.x.h + offset * a.x.w;
      const T* y_row = y + n * a.y.n + p * a.y.h;
      vec<T> sum = zero<T>();
      for (int64_t q = columns.begin; q < columns.end; q += kLanes<T>) {
        const int count = columns.end - q < kLanes<T> ? int(columns.end - q) : kLanes<T>;
        sum = fma(load_columns(y_row + q * a.y.w, a.y.w, count),
                  load_columns(x_row + q * a.stride_w * a.x.w, a.stride_w * a.x.w, count), sum);
      }
      T row = T(0);
      for (int lane = 0; lane < kLanes<T>; ++lane) row += sum.v[lane];
      total += row;
    }
  }
  return total;
}

// --- run: one task is one channel of one filter.
template <class T>
void run(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context) {
  const int64_t channels = a.C / a.groups, filters = a.K / a.groups;
  parallel_ranges(context, a.K * channels, [&](int, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k = i / channels, c = i % channels, g = k / filters;
      const T* x = static_cast<const T*>(args.x) + (g * channels + c) * a.x.c;
      const T* y = static_cast<const T*>(args.y) + k * a.y.c;
      T* w = static_cast<T*>(args.w) + g * a.w.g + k % filters * a.w.k + c * a.w.c;
      for (int64_t r = 0; r < a.R; ++r) {
        for (int64_t s = 0; s < a.S; ++s) w[r * a.w.r + s * a.w.s] = multiply(a, x, y, r, s);
      }
    }
  });
  if (a.epilogue.bias) bias_gradient<T>(a, args, context);
}

// --- contract
const char* reject(const Conv2dProblem&) { return nullptr; }

template <class T>
double cost(const Conv2dProblem& a, const Machine& machine) {
  // Two loads for an FMA and a horizontal sum for every row: a tenth of peak at best, and strided rows are read lane by lane.
  const double row = double(a.Q) / (double(a.Q) + 2 * kLanes<T>);
  const double efficiency = (a.x.w * a.stride_w == 1 && a.y.w == 1 ? 0.1 : 0.02) * row;
  return conv2d_flops(a) / (peak_flops<T>(machine) * efficiency);
}

int64_t workspace(const Conv2dProblem&, const Machine&) { return 0; }

template <class T>
constexpr Kernel<Conv2dProblem> kKernel = {1.0f, reject, cost<T>, workspace, run<T>};

}  // namespace

extern constinit const Kernel<Conv2dProblem> conv2d_wgrad_direct_f32 = kKernel<float>;
extern constinit const Kernel<Conv2dProblem> conv2d_wgrad_direct_f64 = kKernel<double>;

}  // namespace fastconv::FASTCONV_TARGET

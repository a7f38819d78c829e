// max_pool2d_bwd.channels: NHWC. Vectors run along the channels; for each window, every tap takes the gradients that point at it.
//
// R * S compares and masked additions on rows that lie in L1 beat a scatter, which goes one lane at a time. The sum of each x is
// in the order of (p, q), as in the direct kernel. An index outside its window is honoured too, lane by lane; outside the plane
// it adds nothing.
#include "cpu/blocks/parallel.h"
#include "cpu/blocks/pool_rows.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- tile: one vector of channels of a whole sample. The rows under a window are then W cache lines each: 3 x 112 x 64 B = 21
// KB.

// --- transform: rows of x start as zeros, each just before the first window that reaches it.
template <class T>
FC_INLINE void clear_rows(const Pool2dProblem& a, T* x, int64_t& cleared, int64_t until, int n) {
  for (; cleared < until; ++cleared) {
    for (int64_t w = 0; w < a.W; ++w) store_up_to(x + cleared * a.x.h + w * a.x.w, zero<T>(), n);
  }
}

// --- reduce: one window; false if a lane's index is none of its taps.
template <class T>
FC_INLINE bool reduce(const Pool2dProblem& a, T* x, const PoolWindow& rows, const PoolWindow& cols, vec<T> gradient,
                      index_vec<T> index, int n) {
  using Int = typename int_of<T>::type;
  mask<T> found = equal(index, index_set1<T>(-1));
  for (int64_t h = rows.begin; h < rows.end; h += rows.step) {
    for (int64_t w = cols.begin; w < cols.end; w += cols.step) {
      T* tap = x + h * a.x.h + w * a.x.w;
      const mask<T> here = equal(index, index_set1<T>(Int(h * a.W + w)));
      const vec<T> old = load_up_to(tap, n);
      store_up_to(tap, blend(here, old + gradient, old), n);
      found = found | here;
    }
  }
  return (bits(found) | ~((1u << n) - 1)) == ~0u;
}

template <class T>
void scatter_strays(const Pool2dProblem& a, T* x, const PoolWindow& rows, const PoolWindow& cols, const T* y,
                    const int64_t* indices, int n, int64_t& cleared) {
  for (int i = 0; i < n; ++i) {
    const int64_t h = indices[i] / a.W, w = indices[i] % a.W;
    if (indices[i] < 0 || h >= a.H) continue;
    const bool tap = h >= rows.begin && h < rows.end && (h - rows.begin) % rows.step == 0 && w >= cols.begin && w < cols.end &&
                     (w - cols.begin) % cols.step == 0;
    if (tap) continue;
    clear_rows(a, x, cleared, h + 1, n);
    x[h * a.x.h + w * a.x.w + i] += y[i];
  }
}

// --- run: one task is one vector of channels of one sample.
template <class T>
void run(const Pool2dProblem& a, const Pool2dArgs& args, const Context& context) {
  PoolWindow* const columns = static_cast<PoolWindow*>(context.workspace);
  pool_windows(pool_axis_w(a), columns);
  const int64_t blocks = pool_ceil_div(a.C, kLanes<T>);
  parallel_ranges(context, a.N * blocks, [&](int, int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t sample = task / blocks, c = task % blocks * kLanes<T>;
      const int n = int(a.C - c < kLanes<T> ? a.C - c : kLanes<T>);
      T* x = static_cast<T*>(args.x) + sample * a.x.n + c;
      int64_t cleared = 0;
      for (int64_t p = 0; p < a.P; ++p) {
        const PoolWindow rows = pool_window(pool_axis_h(a), p);
        clear_rows(a, x, cleared, rows.end, n);
        const int64_t offset = sample * a.y.n + p * a.y.h + c;
        for (int64_t q = 0; q < a.Q; ++q) {
          const T* y = static_cast<const T*>(args.y) + offset + q * a.y.w;
          const int64_t* indices = args.indices + offset + q * a.y.w;
          if (!reduce(a, x, rows, columns[q], load_up_to(y, n), load_indices<T>(indices, n), n)) {
            scatter_strays(a, x, rows, columns[q], y, indices, n, cleared);
          }
        }
      }
      clear_rows(a, x, cleared, a.H, n);
    }
  });
}

// --- contract
const char* reject(const Pool2dProblem& a) {
  if (a.x.c != 1 || a.y.c != 1) return "the channels of x and y are not dense";
  if (a.H > INT32_MAX / a.W) return "the plane has 2^31 positions or more";
  return nullptr;
}

// Per vector of channels: 2 cycles a tap, 8 for the gradient and its indices, and one for each cleared x.
template <class T>
double cost(const Pool2dProblem& a, const Machine& machine) {
  const double blocks = double(a.N) * double(pool_ceil_div(a.C, kLanes<T>));
  const double windows = double(a.P * a.Q) * (8 + 2 * pool_taps_h(a) * pool_taps_w(a));
  return pool_seconds(blocks * (windows + double(a.H * a.W)), machine);
}

int64_t workspace(const Pool2dProblem& a, const Machine&) { return a.Q * int64_t(sizeof(PoolWindow)); }

template <class T>
constexpr Kernel<Pool2dProblem> kKernel = {1.0f, reject, cost<T>, workspace, run<T>};

}  // namespace

extern constinit const Kernel<Pool2dProblem> max_pool2d_bwd_channels_f32 = kKernel<float>;
extern constinit const Kernel<Pool2dProblem> max_pool2d_bwd_channels_f64 = kKernel<double>;

}  // namespace fastconv::FASTCONV_TARGET

// max_pool2d_bwd.direct: every gradient is added where its index points, one at a time. Any strides, any window.
//
// The sum of each x is in the order of (p, q), whatever the number of threads. An index outside the plane adds nothing: indices
// are data, and data must not become an address unchecked.
#include "cpu/blocks/parallel.h"
#include "cpu/blocks/pool_window.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- tile: some planes of one sample: one where planes are apart (NCHW), as many as there are where channels are dense (NHWC),
// for memory is fastest in order: 16 of 64 channels at a time took three
// times as long.
FC_INLINE bool channels_dense(const Pool2dProblem& a) { return a.x.c == 1 && a.y.c == 1; }

// Split only as far as the threads need it; cache lines stay whole.
FC_INLINE int64_t block_channels(const Pool2dProblem& a, int threads) {
  if (!channels_dense(a)) return 1;
  const int64_t blocks = pool_ceil_div(threads, a.N);
  return pool_round_up(pool_ceil_div(a.C, blocks), 16);
}

// --- transform: rows of x start as zeros, each just before the first window that reaches it, so that they are still in the cache
// when the gradients come.
template <class T>
FC_INLINE void clear_rows(const Pool2dProblem& a, T* x, int64_t channels, int64_t& cleared, int64_t until) {
  for (; cleared < until; ++cleared) {
    T* x_row = x + cleared * a.x.h;
    if (channels == 1 && a.x.w == 1) {
      fill(x_row, a.W, T(0));
    } else {
      for (int64_t w = 0; w < a.W; ++w) fill(x_row + w * a.x.w, channels, T(0));
    }
  }
}

// --- reduce: kDense where the position is index * x.w. Elsewhere it takes a division, which costs ten times the rest.
template <bool kDense, class T>
FC_INLINE void scatter(const Pool2dProblem& a, T* x, const T* y, const int64_t* indices, int64_t channels) {
  const uint64_t positions = uint64_t(a.H * a.W), W = uint64_t(a.W);
  int64_t cleared = 0;
  for (int64_t p = 0; p < a.P; ++p) {
    clear_rows(a, x, channels, cleared, pool_window(pool_axis_h(a), p).end);
    uint64_t ready = uint64_t(cleared) * W;
    for (int64_t q = 0; q < a.Q; ++q) {
      const int64_t offset = p * a.y.h + q * a.y.w;
      for (int64_t c = 0; c < channels; ++c) {
        const uint64_t index = uint64_t(indices[offset + c]);
        if (index >= ready) {
          if (index >= positions) continue;
          clear_rows(a, x, channels, cleared, int64_t(index / W) + 1);
          ready = uint64_t(cleared) * W;
        }
        x[(kDense ? int64_t(index) * a.x.w : int64_t(index / W) * a.x.h + int64_t(index % W) * a.x.w) + c] += y[offset + c];
      }
    }
  }
  clear_rows(a, x, channels, cleared, a.H);
}

// --- run: one task is one block of planes.
template <class T>
void run(const Pool2dProblem& a, const Pool2dArgs& args, const Context& context) {
  const int64_t block = block_channels(a, context.machine->threads), blocks = pool_ceil_div(a.C, block);
  parallel_ranges(context, a.N * blocks, [&](int, int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / blocks, c = task % blocks * block, offset = n * a.y.n + c * a.y.c;
      const int64_t channels = a.C - c < block ? a.C - c : block;
      const T* y = static_cast<const T*>(args.y) + offset;
      const int64_t* indices = args.indices + offset;
      T* x = static_cast<T*>(args.x) + n * a.x.n + c * a.x.c;
      if (a.x.h != a.W * a.x.w) {
        scatter<false>(a, x, y, indices, channels);
      } else if (channels == 1) {
        scatter<true>(a, x, y, indices, 1);
      } else {
        scatter<true>(a, x, y, indices, channels);
      }
    }
  });
}

// --- contract
const char* reject(const Pool2dProblem&) { return nullptr; }

// 3 cycles an output and a quarter for each cleared x where neighbours share cache lines. Strided planes use a line for an
// element.
double cost(const Pool2dProblem& a, const Machine& machine) {
  const bool lines = a.x.w == 1 || channels_dense(a);
  const double per_y = a.x.h != a.W * a.x.w ? 45 : lines ? 3 : 8, per_x = lines ? 0.25 : 4;
  return pool_seconds(double(a.N * a.C) * (per_y * double(a.P * a.Q) + per_x * double(a.H * a.W)), machine);
}

int64_t workspace(const Pool2dProblem&, const Machine&) { return 0; }

template <class T>
constexpr Kernel<Pool2dProblem> kKernel = {1.0f, reject, cost, workspace, run<T>};

}  // namespace

extern constinit const Kernel<Pool2dProblem> max_pool2d_bwd_direct_f32 = kKernel<float>;
extern constinit const Kernel<Pool2dProblem> max_pool2d_bwd_direct_f64 = kKernel<double>;

}  // namespace fastconv::FASTCONV_TARGET

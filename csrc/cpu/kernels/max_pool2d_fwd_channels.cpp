// max_pool2d_fwd.channels: NHWC. Vectors run along the channels; the taps of a window are streamed past accumulators.
#include "cpu/blocks/parallel.h"
#include "cpu/blocks/pool_channels.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- tile: kVectors vectors of channels of one output.
//
// 4 maxima + 4 indices + 1 tap + its index: 10 registers of 16. Four chains of compare and blend (7 cycles) hide each other, and
// four AVX-512 vectors are the 64 channels of ResNet's stem.
constexpr int kVectors = 4;

// --- transform: none, x is read where it lies.

// --- reduce: one output, kV vectors of channels; n channels, whole vectors unless kV is 1.
template <bool kIndices, int kV, class T>
FC_INLINE void reduce(const Pool2dProblem& a, const T* x, const PoolWindow& rows, const PoolWindow& cols, T* y, int64_t* indices,
                      int n) {
  vec<T> best[kV];
  index_vec<T> index[kV];
  max_window<kIndices>(x, {a.x.h, a.x.w}, a.W, rows, cols, n, best, index);
#pragma GCC unroll 4
  for (int v = 0; v < kV; ++v) {
    const int lanes = kV > 1 ? kLanes<T> : n;
    store_up_to(y + v * kLanes<T>, best[v], lanes);
    if constexpr (kIndices) store_indices(indices + v * kLanes<T>, index[v], lanes);
  }
}

// --- run: one task is one output row, or one block of its channels where there are too few rows to share out.
template <bool kIndices, class T>
void run_channels(const Pool2dProblem& a, const Pool2dArgs& args, const Context& context) {
  constexpr int64_t kBlock = kVectors * kLanes<T>;
  const PoolWindows windows = pool_windows(a, context.workspace);
  const int64_t parts = a.N * a.P < 4 * context.machine->threads ? pool_ceil_div(a.C, kBlock) : 1;
  const int64_t part = pool_round_up(pool_ceil_div(a.C, parts), kBlock);
  parallel_ranges(context, a.N * a.P * parts, [&](int, int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t c_begin = task % parts * part, p = task / parts % a.P, n = task / parts / a.P;
      const int64_t c_end = a.C < c_begin + part ? a.C : c_begin + part;
      const T* x = static_cast<const T*>(args.x) + n * a.x.n;
      const PoolWindow& rows = windows.rows[p];
      for (int64_t q = 0; q < a.Q; ++q) {
        const PoolWindow& cols = windows.cols[q];
        const int64_t offset = n * a.y.n + p * a.y.h + q * a.y.w;
        T* y = static_cast<T*>(args.y) + offset;
        int64_t* indices = kIndices ? args.indices + offset : nullptr;
        int64_t c = c_begin;
        for (; c + kBlock <= c_end; c += kBlock)
          reduce<kIndices, kVectors>(a, x + c, rows, cols, y + c, kIndices ? indices + c : nullptr, int(kBlock));
        for (; c < c_end; c += kLanes<T>) {
          const int64_t lanes = c_end - c < kLanes<T> ? c_end - c : kLanes<T>;
          reduce<kIndices, 1>(a, x + c, rows, cols, y + c, kIndices ? indices + c : nullptr, int(lanes));
        }
      }
    }
  });
}

template <class T>
void run(const Pool2dProblem& a, const Pool2dArgs& args, const Context& context) {
  if (args.indices) {
    run_channels<true, T>(a, args, context);
  } else {
    run_channels<false, T>(a, args, context);
  }
}

// --- contract
const char* reject(const Pool2dProblem& a) {
  if (a.x.c != 1 || a.y.c != 1) return "the channels of x and y are not dense";
  if (a.H > INT32_MAX / a.W) return "the plane has 2^31 positions or more";
  if (pool_has_empty_window(a)) return "a window lies wholly in the padding";
  return nullptr;
}

// Per vector of channels: a load and five operations on two ports for each tap, 10 cycles for the stores and the loop.
template <class T>
double cost(const Pool2dProblem& a, const Machine& machine) {
  const double vectors = double(a.N * a.P * a.Q) * double(pool_ceil_div(a.C, kLanes<T>));
  return pool_seconds(vectors * (10 + 3 * pool_taps_h(a) * pool_taps_w(a)), machine);
}

int64_t workspace(const Pool2dProblem& a, const Machine&) { return PoolWindows::bytes(a); }

template <class T>
constexpr Kernel<Pool2dProblem> kKernel = {1.0f, reject, cost<T>, workspace, run<T>};

}  // namespace

extern constinit const Kernel<Pool2dProblem> max_pool2d_fwd_channels_f32 = kKernel<float>;
extern constinit const Kernel<Pool2dProblem> max_pool2d_fwd_channels_f64 = kKernel<double>;

}  // namespace fastconv::FASTCONV_TARGET

// avg_pool2d_bwd.channels: NHWC. Vectors run along the channels; each position of x gathers the windows that cover it.
//
// Gathered, not scattered: x is written once and never read, and any share of the rows gives the same bits.
#include "cpu/blocks/parallel.h"
#include "cpu/blocks/pool_channels.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- tile: kVectors vectors of channels of one position: 4 sums + 1 divisor of 16 registers.
constexpr int kVectors = 4;

// --- transform: none, y is read where it lies; what its windows count is worked out once, in a PoolGather.

// --- reduce: a row of x at a time, in cpu/blocks/pool_channels.h.

// --- run: one task is one block of channels of one row of x.
template <class T>
void run(const Pool2dProblem& a, const Pool2dArgs& args, const Context& context) {
  constexpr int64_t kBlock = kVectors * kLanes<T>;
  const PoolGather gather = pool_gather(a, context.workspace);
  const int64_t blocks = pool_ceil_div(a.C, kBlock);
  parallel_ranges(context, a.N * a.H * blocks, [&](int, int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task % blocks, h = task / blocks % a.H, n = task / blocks / a.H;
      const PoolCover ps = gather.covers.rows[h];
      const int64_t c_end = a.C < (block + 1) * kBlock ? a.C : (block + 1) * kBlock;
      for (int64_t c = block * kBlock; c < c_end;) {
        const T* y = static_cast<const T*>(args.y) + n * a.y.n + c;
        T* x = static_cast<T*>(args.x) + n * a.x.n + h * a.x.h + c;
        if (c_end - c == kBlock) {
          gather_row<kVectors>(gather, y, {a.y.h, a.y.w}, a.W, ps, x, a.x.w, int(kBlock));
          c += kBlock;
        } else {
          const int lanes = int(c_end - c < kLanes<T> ? c_end - c : kLanes<T>);
          gather_row<1>(gather, y, {a.y.h, a.y.w}, a.W, ps, x, a.x.w, lanes);
          c += lanes;
        }
      }
    }
  });
}

// --- contract
const char* reject(const Pool2dProblem& a) {
  if (a.x.c != 1 || a.y.c != 1) return "the channels of x and y are not dense";
  if (a.dilation_h != 1 || a.dilation_w != 1) return "average pooling has no dilation";
  return nullptr;
}

// Per vector of channels: a load and an addition for each window that covers the position, 12 cycles for the rest.
template <class T>
double cost(const Pool2dProblem& a, const Machine& machine) {
  const double windows = pool_taps_h(a) * pool_taps_w(a) * double(a.P * a.Q) / double(a.H * a.W);
  const double vectors = double(a.N * a.H * a.W) * double(pool_ceil_div(a.C, kLanes<T>));
  return pool_seconds(vectors * (12 + windows), machine);
}

int64_t workspace(const Pool2dProblem& a, const Machine&) { return PoolGather::bytes(a); }

template <class T>
constexpr Kernel<Pool2dProblem> kKernel = {1.0f, reject, cost<T>, workspace, run<T>};

}  // namespace

extern constinit const Kernel<Pool2dProblem> avg_pool2d_bwd_channels_f32 = kKernel<float>;
extern constinit const Kernel<Pool2dProblem> avg_pool2d_bwd_channels_f64 = kKernel<double>;

}  // namespace fastconv::FASTCONV_TARGET

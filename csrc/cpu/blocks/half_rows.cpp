#include "cpu/blocks/half_rows.h"

#include "cpu/blocks/activation.h"
#include "cpu/blocks/parallel.h"
#include "cpu/blocks/pixel_rows.h"
#include "cpu/blocks/split.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// What the widened pixels and the sums of a chunk may take: three quarters of an L2.
constexpr int64_t kMaxChunkBytes = 768 << 10;
// But no fewer pixels than these: filters are packed for every chunk, which costs as much as 16 pixels, 4 % of 384.
constexpr int64_t kMinChunkPixels = 384;

EvenSplit pixel_chunks(const Conv2dProblem& a) {
  const int64_t fit = kMaxChunkBytes / ((a.C + a.K) * int64_t(sizeof(float)));
  return {a.N * a.P * a.Q, fit < kMinChunkPixels ? kMinChunkPixels : fit};
}

// `pixels` outputs of a 1x1 filter and what they read, one after the other.
Conv2dProblem chunk_problem(const Conv2dProblem& a, int64_t pixels) {
  Conv2dProblem b = a;
  b.N = pixels;
  b.H = b.W = b.P = b.Q = 1;
  b.stride_h = b.stride_w = 1;
  b.pad_top = b.pad_left = 0;
  b.x = {a.C, 1, a.C, a.C};
  b.y = {a.K, 1, a.K, a.K};
  b.epilogue = {false, false, Activation::none};
  return b;
}

struct Scratch {
  float *x, *y;  // [pixels of a chunk][channels], [..][filters]
  FC_INLINE Scratch(Arena& arena, const Conv2dProblem& a, int64_t pixels)
      : x(arena.take<float>(pixels * a.C)), y(arena.take<float>(pixels * a.K)) {}
};

template <class S>
void widen_pixels(const Conv2dProblem& a, const S* x, int64_t first, int64_t pixels, float* out, const Context& context) {
  constexpr int kL = kLanes<float>;
  parallel_ranges(context, pixels, [&](int, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t pixel = first + i, q = pixel % a.Q, p = pixel / a.Q % a.P, n = pixel / a.Q / a.P;
      const int64_t h = p * a.stride_h - a.pad_top, w = q * a.stride_w - a.pad_left;
      const bool inside = uint64_t(h) < uint64_t(a.H) && uint64_t(w) < uint64_t(a.W);
      const S* from = inside ? x + n * a.x.n + h * a.x.h + w * a.x.w : nullptr;
      float* to = out + i * a.C;
      int64_t c = 0;
      for (; c + kL <= a.C; c += kL) store(to + c, inside ? load(from + c) : zero<float>());
      if (c < a.C) store(to + c, inside ? load(from + c, int(a.C - c)) : zero<float>(), int(a.C - c));
    }
  });
}

// The epilogue, in the order of gemm_tile's, and the one rounding.
template <class S>
void narrow_pixels(const Conv2dProblem& a, const Conv2dArgs& args, int64_t first, int64_t pixels, const float* sums,
                   const Context& context) {
  constexpr int kL = kLanes<float>;
  const S* bias = a.epilogue.bias ? static_cast<const S*>(args.bias) : nullptr;
  const S* residual = a.epilogue.residual ? static_cast<const S*>(args.residual) : nullptr;
  parallel_ranges(context, pixels, [&](int, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t pixel = first + i, q = pixel % a.Q, p = pixel / a.Q % a.P, n = pixel / a.Q / a.P;
      const int64_t offset = n * a.y.n + p * a.y.h + q * a.y.w;
      const float* from = sums + i * a.K;
      S* y = static_cast<S*>(args.y) + offset;
      for (int64_t k = 0; k < a.K; k += kL) {
        const int lanes = a.K - k < kL ? int(a.K - k) : kL;
        vec<float> sum = load(from + k, lanes);
        if (bias) sum = sum + load(bias + k, lanes);
        if (residual) sum = sum + load(residual + offset + k, lanes);
        sum = activate(a.epilogue.activation, sum);
        lanes == kL ? store(y + k, sum) : store(y + k, sum, lanes);
      }
    }
  });
}

}  // namespace

const char* half_rows_reject(const Conv2dProblem& a) {
  if (a.R * a.S != 1) return "the filters are larger than 1x1";
  return pixel_rows_reject(a);
}

template <class S>
int64_t half_rows_workspace(const Conv2dProblem& a, const Machine& machine) {
  const int64_t pixels = pixel_chunks(a).largest();
  Arena arena(nullptr);
  const Scratch counted(arena, a, pixels);
  return arena.used() + pixel_rows_workspace<S>(chunk_problem(a, pixels), machine);
}

template <class S>
void half_rows_run(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context) {
  const EvenSplit chunks = pixel_chunks(a);
  Arena arena(context.workspace);
  const Scratch scratch(arena, a, chunks.largest());
  Context inner = context;
  inner.workspace = static_cast<char*>(context.workspace) + arena.used();
  for (int64_t i = 0; i < chunks.parts; ++i) {
    const int64_t first = chunks.begin(i), pixels = chunks.size(i);
    widen_pixels(a, static_cast<const S*>(args.x), first, pixels, scratch.x, context);
    pixel_rows_run<S>(chunk_problem(a, pixels), {scratch.x, args.w, nullptr, nullptr, scratch.y, args.packed}, inner);
    narrow_pixels<S>(a, args, first, pixels, scratch.y, context);
  }
}

template int64_t half_rows_workspace<bf16>(const Conv2dProblem&, const Machine&);
template int64_t half_rows_workspace<f16>(const Conv2dProblem&, const Machine&);
template void half_rows_run<bf16>(const Conv2dProblem&, const Conv2dArgs&, const Context&);
template void half_rows_run<f16>(const Conv2dProblem&, const Conv2dArgs&, const Context&);

}  // namespace fastconv::FASTCONV_TARGET

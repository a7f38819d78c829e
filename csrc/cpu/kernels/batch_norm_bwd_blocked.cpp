// batch_norm_bwd.blocked: sums over a channel of the gradient, and of it times x, then the gradient of x.
//
// The activation's slope is computed again from x, which is read anyway: nothing but x and the residual is kept for it. Sums of a
// block are those of its dtype, sums of blocks are double's, in order.
#include "cpu/blocks/batch_norm.h"
#include "cpu/blocks/parallel.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- tile: x and dy are read twice and dx is written once, the floor of training. The gradient of the residual is written with
// the sums and read in place of dy and residual afterwards.

// --- transform: the gradient behind the activation.
template <Activation A, class T>
FC_INLINE vec<T> times_slope(vec<T> dy, vec<T> z) {
  const vec<T> none = zero<T>(), one = set1(T(1));
  if constexpr (A == Activation::relu) return blend(greater(z, none), dy, none);
  if constexpr (A == Activation::relu6) return blend(greater(z, none), blend(greater(set1(T(6)), z), dy, none), none);
  if constexpr (A == Activation::silu) {
    const vec<T> s = times_sigmoid(one, z);
    return dy * (s * fma(z, one - s, one));
  }
  if constexpr (A == Activation::hardswish) {
    // torch's slopes at -3 and 3 are those of the parabola.
    const vec<T> inside = dy * fma(z, set1(T(1) / T(3)), set1(T(0.5)));
    return blend(greater(set1(T(-3)), z), none, blend(greater(z, set1(T(3))), dy, inside));
  }
  return dy;
}

template <bool Last, Activation A, class T>
struct Gradient {
  Normalised<Last, T> from;
  const T* dy;
  T* dresidual;
  FC_INLINE Gradient(const BatchNormProblem& a, const BatchNormArgs& args, const ChannelNumbers<T>& numbers)
      : from(a, args, numbers), dy(static_cast<const T*>(args.dy)), dresidual(static_cast<T*>(args.dresidual)) {}
  FC_INLINE vec<T> g(vec<T> distance, int64_t at, int64_t c, int n) const {
    const vec<T> d = from.memory.load(dy + at, n);
    if constexpr (A == Activation::none) {
      return d;
    } else {
      return times_slope<A>(d, from.z(distance, at, c, n));
    }
  }
  // Lanes from n on have dy = 0.
  FC_INLINE void operator()(int64_t at, int64_t c, int n, vec<T>& s, vec<T>& t) const {
    const vec<T> distance = from.distance(at, c, n), v = g(distance, at, c, n);
    if (dresidual) store_some(dresidual + at, v, n);
    s = s + v;
    t = fma(v, distance, t);
  }
};

// --- reduce
struct Sums {
  double g, g_distance;
};

// dx = g * scale + (distance * slope + shift).
template <class T>
struct Scratch {
  ChannelNumbers<T> numbers;
  T *slope, *shift;
  Sums* sums;  // channels last only, as is `blocks`: both sums of each block
  T* blocks;
  int64_t width, bytes;
  FC_INLINE Scratch(const BatchNormProblem& a, void* base) : sums(nullptr), blocks(nullptr), width(round_up(a.C, kLanes<T>)) {
    Arena arena(base);
    numbers = ChannelNumbers<T>::take(arena, width);
    slope = arena.take<T>(width);
    shift = arena.take<T>(width);
    if (a.channels_last) {
      sums = arena.take<Sums>(width);
      blocks = arena.take<T>(batch_norm_blocks(a, sizeof(T)).parts * 2 * width);
    }
    bytes = arena.used();
  }
};

template <class T>
FC_INLINE void start(const BatchNormProblem& a, const BatchNormArgs& args, const Scratch<T>& scratch, int64_t c) {
  scratch.numbers.read(a, args, c);
  scratch.slope[c] = scratch.shift[c] = 0;
}

template <class T>
FC_INLINE void finish(const BatchNormProblem& a, const BatchNormArgs& args, const Scratch<T>& scratch, int64_t c,
                      const Sums& sums) {
  const double rstd = double(scratch.numbers.rstd[c]), scale = double(scratch.numbers.scale[c]);
  if (args.dgamma) static_cast<T*>(args.dgamma)[c] = T(sums.g_distance * rstd);
  if (args.dbeta) static_cast<T*>(args.dbeta)[c] = T(sums.g);
  if (!a.training) return;
  const double count = double(a.N) * double(a.P);
  scratch.slope[c] = T(-scale * rstd * rstd * sums.g_distance / count);
  scratch.shift[c] = T(-scale * sums.g / count);
}

FC_INLINE bool needs_sums(const BatchNormProblem& a, const BatchNormArgs& args) {
  return args.dgamma || args.dbeta || args.dresidual || (a.training && args.dx);
}

// --- run
template <bool Last, Activation A, class T>
FC_INLINE void input_gradient(const BatchNormProblem& a, const BatchNormArgs& args, const Scratch<T>& scratch, int64_t channel,
                              int64_t begin, int64_t end) {
  const Gradient<Last, A, T> gradient(a, args, scratch.numbers);
  T* const dx = static_cast<T*>(args.dx);
  const T* const ready = gradient.dresidual;
  each_vector<Last, T>(a, channel, begin, end, [&](int64_t at, int64_t c, int n) {
    const vec<T> distance = gradient.from.distance(at, c, n);
    const vec<T> g = ready ? gradient.from.memory.load(ready + at, n) : gradient.g(distance, at, c, n);
    const vec<T> rest = fma(distance, of_channel<Last>(scratch.slope, c), of_channel<Last>(scratch.shift, c));
    store_some(dx + at, fma(g, of_channel<Last>(scratch.numbers.scale, c), rest), n);
  });
}

template <Activation A, class T>
void run_last(const BatchNormProblem& a, const BatchNormArgs& args, const Context& context, const Scratch<T>& scratch) {
  for (int64_t c = 0; c < a.C; ++c) start(a, args, scratch, c);
  const EvenSplit blocks = batch_norm_blocks(a, sizeof(T));
  const auto of_block = [&](int64_t block) { return scratch.blocks + block * 2 * scratch.width; };
  if (needs_sums(a, args)) {
    const Gradient<true, A, T> term(a, args, scratch.numbers);
    parallel_ranges(context, blocks.parts, [&](int, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        sum_block<true>(a, 0, blocks.begin(i), blocks.begin(i + 1), term, of_block(i), of_block(i) + scratch.width);
      }
    });
    for (int64_t c = 0; c < a.C; ++c) scratch.sums[c] = {0, 0};
    for (int64_t i = 0; i < blocks.parts; ++i) {
      const T *first = of_block(i), *second = first + scratch.width;
      for (int64_t c = 0; c < a.C; ++c) {
        scratch.sums[c].g += double(first[c]);
        scratch.sums[c].g_distance += double(second[c]);
      }
    }
    for (int64_t c = 0; c < a.C; ++c) finish(a, args, scratch, c, scratch.sums[c]);
  }
  if (!args.dx) return;
  parallel_ranges(context, blocks.parts, [&](int, int64_t begin, int64_t end) {
    input_gradient<true, A>(a, args, scratch, 0, blocks.begin(begin), blocks.begin(end));
  });
}

template <Activation A, class T>
void run_first(const BatchNormProblem& a, const BatchNormArgs& args, const Context& context, const Scratch<T>& scratch) {
  const EvenSplit blocks = batch_norm_blocks(a, sizeof(T));
  parallel_ranges(context, a.C, [&](int, int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      start(a, args, scratch, c);
      if (needs_sums(a, args)) {
        const Gradient<false, A, T> term(a, args, scratch.numbers);
        Sums sums{0, 0};
        for (int64_t i = 0; i < blocks.parts; ++i) {
          T first, second;
          sum_block<false>(a, c, blocks.begin(i), blocks.begin(i + 1), term, &first, &second);
          sums.g += double(first);
          sums.g_distance += double(second);
        }
        finish(a, args, scratch, c, sums);
      }
      if (args.dx) input_gradient<false, A>(a, args, scratch, c, 0, a.N);
    }
  });
}

template <class T>
void run(const BatchNormProblem& a, const BatchNormArgs& args, const Context& context) {
  const Scratch<T> scratch(a, context.workspace);
  with_activation(a.activation, [&](auto activation) {
    constexpr Activation kA = decltype(activation)::value;
    a.channels_last ? run_last<kA>(a, args, context, scratch) : run_first<kA>(a, args, context, scratch);
  });
}

// --- contract
const char* reject(const BatchNormProblem& a) { return why_no_batch_norm(a); }

// Five passes at 8 bytes a cycle.
template <class T>
double cost(const BatchNormProblem& a, const Machine& machine) {
  return double(a.N) * double(a.C) * double(a.P) * 5 * sizeof(T) / (8 * 3e9 * machine.threads);
}

template <class T>
int64_t workspace(const BatchNormProblem& a, const Machine&) {
  return Scratch<T>(a, nullptr).bytes;
}

template <class T>
constexpr Kernel<BatchNormProblem> kKernel = {1.0f, reject, cost<T>, workspace<T>, run<T>};

}  // namespace

extern constinit const Kernel<BatchNormProblem> batch_norm_bwd_blocked_f32 = kKernel<float>;
extern constinit const Kernel<BatchNormProblem> batch_norm_bwd_blocked_f64 = kKernel<double>;

}  // namespace fastconv::FASTCONV_TARGET

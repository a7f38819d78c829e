// batch_norm_fwd.blocked: moments of a channel from blocks that stay in the L2, then the normalisation with addition and
// activation.
//
// A block's first pass finds a number near its mean, the second sums distances from it and their squares: a difference of
// averages of squares would cancel. Blocks are merged in double, in order (Chan, Golub, LeVeque: Updating formulae and a pairwise
// algorithm for computing sample variances, 1979).
#include "cpu/blocks/batch_norm.h"
#include "cpu/blocks/parallel.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- tile: memory is read twice and written once, the floor of training: statistics come before the first result. With channels
// first a channel is finished before the next begins, so that one of up to a megabyte is read from memory once.

// --- transform: distances from the pivot.
template <bool Last, class T>
struct AddUp {
  const T* x;
  FetchAhead<Last, T> memory;
  FC_INLINE void operator()(int64_t at, int64_t, int n, vec<T>& s, vec<T>&) const { s = s + memory.load(x + at, n); }
};

template <bool Last, class T>
struct Spread {
  const T *x, *pivot;
  FC_INLINE void operator()(int64_t at, int64_t c, int n, vec<T>& s, vec<T>& t) const {
    vec<T> d = load_some(x + at, n) - of_channel<Last>(pivot, Last ? c : 0);
    if (!Last && n < kLanes<T>) d = blend(first_lanes<T>(n), d, zero<T>());
    s = s + d;
    t = fma(d, d, t);
  }
};

// --- reduce: moments of a block, about the pivot, and of all blocks so far.
struct Moments {
  double mean, squares;  // the second about the first
  // Of a block, which is `share` of all so far: divisions by its count are done once for all channels.
  struct Block {
    double before, inverse, share;
    FC_INLINE Block(double before_, double count) : before(before_), inverse(1 / count), share(count / (before_ + count)) {}
  };
  FC_INLINE void merge(const Block& block, double pivot, double first, double second) {
    const double shift = first * block.inverse, d = pivot + shift - mean;
    mean += d * block.share;
    squares += second - first * shift + d * d * block.before * block.share;
  }
};

template <bool Last, class T>
FC_INLINE void block_moments(const BatchNormProblem& a, const T* x, int64_t channel, int64_t begin, int64_t end, T* pivot,
                             T* first, T* second) {
  sum_block<Last>(a, channel, begin, end, AddUp<Last, T>{x, FetchAhead<Last, T>(a)}, pivot, first);
  const T count = T((end - begin) * (Last ? 1 : a.P));
  for (int64_t c = 0; c < (Last ? a.C : 1); ++c) pivot[c] /= count;
  sum_block<Last>(a, channel, begin, end, Spread<Last, T>{x, pivot}, first, second);
}

// --- run
template <class T>
struct Scratch {
  ChannelNumbers<T> numbers;
  Moments* moments;  // channels last only, as is `blocks`: pivot, first and second sum of each block
  T* blocks;
  int64_t width, bytes;
  FC_INLINE Scratch(const BatchNormProblem& a, void* base) : moments(nullptr), blocks(nullptr), width(round_up(a.C, kLanes<T>)) {
    Arena arena(base);
    numbers = ChannelNumbers<T>::take(arena, width);
    if (a.channels_last && a.training) {
      moments = arena.take<Moments>(width);
      blocks = arena.take<T>(batch_norm_blocks(a, sizeof(T)).parts * 3 * width);
    }
    bytes = arena.used();
  }
};

template <class T>
FC_INLINE void finish(const BatchNormProblem& a, const BatchNormArgs& args, int64_t c, const Moments& found,
                      const ChannelNumbers<T>& numbers) {
  const double variance = found.squares > 0 || found.squares != found.squares ? found.squares / (double(a.N) * double(a.P)) : 0;
  static_cast<T*>(args.mean)[c] = T(found.mean);
  static_cast<T*>(args.variance)[c] = T(variance);
  numbers.read(a, args, c);
}

template <bool Last, Activation A, class T>
FC_INLINE void normalise(const BatchNormProblem& a, const BatchNormArgs& args, const ChannelNumbers<T>& numbers, int64_t channel,
                         int64_t begin, int64_t end) {
  const Normalised<Last, T> from(a, args, numbers);
  T* const y = static_cast<T*>(args.y);
  each_vector<Last, T>(a, channel, begin, end, [&](int64_t at, int64_t c, int n) {
    store_some(y + at, activate(A, from.z(from.distance(at, c, n), at, c, n)), n);
  });
}

template <class T>
void all_moments(const BatchNormProblem& a, const BatchNormArgs& args, const Context& context, const Scratch<T>& scratch) {
  const EvenSplit blocks = batch_norm_blocks(a, sizeof(T));
  const auto of_block = [&](int64_t block) { return scratch.blocks + block * 3 * scratch.width; };
  parallel_ranges(context, blocks.parts, [&](int, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      T* const sums = of_block(i);
      block_moments<true>(a, static_cast<const T*>(args.x), 0, blocks.begin(i), blocks.begin(i + 1), sums, sums + scratch.width,
                          sums + 2 * scratch.width);
    }
  });
  for (int64_t c = 0; c < a.C; ++c) scratch.moments[c] = {0, 0};
  double before = 0;
  for (int64_t i = 0; i < blocks.parts; ++i) {
    const T *pivot = of_block(i), *first = pivot + scratch.width, *second = first + scratch.width;
    const Moments::Block merged(before, double(blocks.size(i)));
    for (int64_t c = 0; c < a.C; ++c) scratch.moments[c].merge(merged, double(pivot[c]), double(first[c]), double(second[c]));
    before += double(blocks.size(i));
  }
  for (int64_t c = 0; c < a.C; ++c) finish(a, args, c, scratch.moments[c], scratch.numbers);
}

template <Activation A, class T>
void run_last(const BatchNormProblem& a, const BatchNormArgs& args, const Context& context, const Scratch<T>& scratch) {
  if (a.training) {
    all_moments(a, args, context, scratch);
  } else {
    for (int64_t c = 0; c < a.C; ++c) scratch.numbers.read(a, args, c);
  }
  const EvenSplit blocks = batch_norm_blocks(a, sizeof(T));
  parallel_ranges(context, blocks.parts, [&](int, int64_t begin, int64_t end) {
    normalise<true, A>(a, args, scratch.numbers, 0, blocks.begin(begin), blocks.begin(end));
  });
}

template <Activation A, class T>
void run_first(const BatchNormProblem& a, const BatchNormArgs& args, const Context& context, const Scratch<T>& scratch) {
  const EvenSplit blocks = batch_norm_blocks(a, sizeof(T));
  parallel_ranges(context, a.C, [&](int, int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      if (a.training) {
        Moments moments{0, 0};
        double before = 0;
        for (int64_t i = 0; i < blocks.parts; ++i) {
          T pivot, first, second;
          block_moments<false>(a, static_cast<const T*>(args.x), c, blocks.begin(i), blocks.begin(i + 1), &pivot, &first,
                               &second);
          const double count = double(blocks.size(i)) * double(a.P);
          moments.merge(Moments::Block(before, count), double(pivot), double(first), double(second));
          before += count;
        }
        finish(a, args, c, moments, scratch.numbers);
      } else {
        scratch.numbers.read(a, args, c);
      }
      normalise<false, A>(a, args, scratch.numbers, c, 0, a.N);
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

// Three passes at 8 bytes a cycle.
template <class T>
double cost(const BatchNormProblem& a, const Machine& machine) {
  return double(a.N) * double(a.C) * double(a.P) * 3 * sizeof(T) / (8 * 3e9 * machine.threads);
}

template <class T>
int64_t workspace(const BatchNormProblem& a, const Machine&) {
  return Scratch<T>(a, nullptr).bytes;
}

template <class T>
constexpr Kernel<BatchNormProblem> kKernel = {1.0f, reject, cost<T>, workspace<T>, run<T>};

}  // namespace

extern constinit const Kernel<BatchNormProblem> batch_norm_fwd_blocked_f32 = kKernel<float>;
extern constinit const Kernel<BatchNormProblem> batch_norm_fwd_blocked_f64 = kKernel<double>;

}  // namespace fastconv::FASTCONV_TARGET

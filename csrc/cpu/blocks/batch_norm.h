// Batch normalisation's walk over memory: blocks of positions, their sums by channel, and the numbers that a channel is given.
//
// Two layouts, and `Last` tells them apart: with channels last a vector holds neighbouring channels of one position and a block
// is a run of positions with all their channels; otherwise a vector holds neighbouring positions of one channel and a block is a
// run of samples, of which it has one channel. Where blocks begin follows from the problem alone, so threads do not show.
#pragma once

#include "core/kernel.h"
#include "cpu/blocks/activation.h"
#include "cpu/blocks/norm_row.h"

namespace fastconv::FASTCONV_TARGET {

// A block is read twice, the second time from the L2, of which it takes an eighth to a half.
inline constexpr int64_t kBatchNormBlockBytes = 131072;
// And it is summed one position after the other: the rounding of a sum of squares grows with the root of their number.
inline constexpr int64_t kBatchNormPositions = 512;

FC_INLINE EvenSplit batch_norm_blocks(const BatchNormProblem& a, int64_t size) {
  int64_t most = kBatchNormBlockBytes / size / (a.channels_last ? a.C : a.P);
  if (a.channels_last && most > kBatchNormPositions) most = kBatchNormPositions;
  return EvenSplit(a.channels_last ? a.N * a.P : a.N, most < 1 ? 1 : most);
}

// How far ahead of its reading an image larger than caches is fetched with channels last, of which several lines are read at a
// time: the hardware's prefetchers stop at a page. 256 channels of 56x56 at batch 8 1.25 times as fast, 96 of 112x112 1.4 to 1.5
// (Zen 5); 512 of 7x7, which lie in the L2, are 1.3 times as slow by it, and planes gain nothing.
inline constexpr int64_t kBatchNormAheadBytes = 4096, kBatchNormFetchedBytes = 4 << 20;

template <bool Last, class T>
struct FetchAhead {
  int64_t elements;
  FC_INLINE explicit FetchAhead(const BatchNormProblem& a)
      : elements(a.N * a.C * a.P * int64_t(sizeof(T)) < kBatchNormFetchedBytes ? 0 : kBatchNormAheadBytes / int64_t(sizeof(T))) {}
  FC_INLINE vec<T> load(const T* x, int n) const {
    if (Last && elements > 0) __builtin_prefetch(x + elements);
    return load_some(x, n);
  }
};

// What a channel's numbers are brought in with: (x - mean) * scale + beta, where scale = rstd * gamma. Whole vectors.
template <class T>
struct ChannelNumbers {
  T *mean, *rstd, *scale, *beta;
  FC_INLINE static ChannelNumbers take(Arena& arena, int64_t width) {
    return {arena.take<T>(width), arena.take<T>(width), arena.take<T>(width), arena.take<T>(width)};
  }
  // From mean and variance as they are kept, so that forward and backward find the same sign in front of an activation.
  FC_INLINE void read(const BatchNormProblem& a, const BatchNormArgs& args, int64_t c) const {
    const double r = 1.0 / __builtin_sqrt(double(static_cast<const T*>(args.variance)[c]) + a.eps);
    mean[c] = static_cast<const T*>(args.mean)[c];
    rstd[c] = T(r);
    scale[c] = T(args.gamma ? r * double(static_cast<const T*>(args.gamma)[c]) : r);
    beta[c] = args.beta ? static_cast<const T*>(args.beta)[c] : T(0);
  }
};

// A number of each channel for the lanes of a vector.
template <bool Last, class T>
FC_INLINE vec<T> of_channel(const T* numbers, int64_t c) {
  if constexpr (Last) {
    return load(numbers + c);
  } else {
    return set1(numbers[c]);
  }
}

// What the activation is applied to, and the distance from the mean that it is made of.
template <bool Last, class T>
struct Normalised {
  const T *x, *residual;
  ChannelNumbers<T> channel;
  FetchAhead<Last, T> memory;
  FC_INLINE Normalised(const BatchNormProblem& a, const BatchNormArgs& args, const ChannelNumbers<T>& numbers)
      : x(static_cast<const T*>(args.x)), residual(static_cast<const T*>(args.residual)), channel(numbers), memory(a) {}
  FC_INLINE vec<T> distance(int64_t at, int64_t c, int n) const {
    return memory.load(x + at, n) - of_channel<Last>(channel.mean, c);
  }
  FC_INLINE vec<T> z(vec<T> distance, int64_t at, int64_t c, int n) const {
    const vec<T> v = fma(distance, of_channel<Last>(channel.scale, c), of_channel<Last>(channel.beta, c));
    return residual ? v + memory.load(residual + at, n) : v;
  }
};

// body(at, c, n) for each vector of `begin` to `end`, positions or samples, the latter of channel c: n numbers from place `at`
// on.
template <bool Last, class T, class Body>
FC_INLINE void each_vector(const BatchNormProblem& a, int64_t channel, int64_t begin, int64_t end, const Body& body) {
  constexpr int kL = kLanes<T>;
  const int64_t length = Last ? a.C : a.P;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t line = Last ? i * a.C : (i * a.C + channel) * a.P;
    int64_t j = 0;
    for (; j + kL <= length; j += kL) body(line + j, Last ? j : channel, kL);
    if (j < length) body(line + j, Last ? j : channel, int(length - j));
  }
}

template <int N>
struct Count {
  static constexpr int value = N;
};

// Two sums over a block: term(at, c, n, s, t) adds a vector to s and t, and zeros in lanes from n on. With channels last they are
// sums for each channel, else one number each.
template <bool Last, class T, class Term>
FC_INLINE void sum_block(const BatchNormProblem& a, int64_t channel, int64_t begin, int64_t end, const Term& term, T* first,
                         T* second) {
  constexpr int kL = kLanes<T>;
  if constexpr (Last) {
    for (int64_t c = 0; c < a.C; c += kL) {
      store(first + c, zero<T>());
      store(second + c, zero<T>());
    }
    // Four positions together, so that sums are loaded and stored for every fourth.
    const auto positions = [&](int64_t i, auto count) {
      const auto at = [&](int64_t c, int n) {
        vec<T> s = load(first + c), t = load(second + c);
#pragma GCC unroll 4
        for (int k = 0; k < decltype(count)::value; ++k) term((i + k) * a.C + c, c, n, s, t);
        store(first + c, s);
        store(second + c, t);
      };
      int64_t c = 0;
      for (; c + kL <= a.C; c += kL) at(c, kL);
      if (c < a.C) at(c, int(a.C - c));
    };
    int64_t i = begin;
    for (; i + 4 <= end; i += 4) positions(i, Count<4>{});
    for (; i < end; ++i) positions(i, Count<1>{});
  } else {
    vec<T> s[kNormChains], t[kNormChains], total_s = zero<T>(), total_t = zero<T>();
    const auto join = [&] {
      total_s = total_s + ((s[0] + s[1]) + (s[2] + s[3]));
      total_t = total_t + ((t[0] + t[1]) + (t[2] + t[3]));
      for (int k = 0; k < kNormChains; ++k) s[k] = t[k] = zero<T>();
    };
    for (int k = 0; k < kNormChains; ++k) s[k] = t[k] = zero<T>();
    for (int64_t i = begin; i < end; ++i) {
      const int64_t line = (i * a.C + channel) * a.P;
      for (int64_t piece = 0; piece < a.P; piece += kNormChunk<T>) {
        const int64_t last = a.P - piece < kNormChunk<T> ? a.P : piece + kNormChunk<T>;
        int64_t j = piece;
        for (; j + kNormChains * kL <= last; j += kNormChains * kL) {
#pragma GCC unroll 4
          for (int k = 0; k < kNormChains; ++k) term(line + j + k * kL, channel, kL, s[k], t[k]);
        }
        for (; j + kL <= last; j += kL) term(line + j, channel, kL, s[0], t[0]);
        if (j < last) term(line + j, channel, int(last - j), s[1], t[1]);
        if (a.P >= kNormChunk<T>) join();
      }
    }
    join();
    *first = reduce_add(total_s);
    *second = reduce_add(total_t);
  }
}

template <Activation A>
struct ActivationIs {
  static constexpr Activation value = A;
};

// Those that have a slope below. body(ActivationIs<a>{}) with the activation as a constant.
template <class Body>
FC_INLINE void with_activation(Activation a, const Body& body) {
  switch (a) {
    case Activation::relu:
      return body(ActivationIs<Activation::relu>{});
    case Activation::relu6:
      return body(ActivationIs<Activation::relu6>{});
    case Activation::silu:
      return body(ActivationIs<Activation::silu>{});
    case Activation::hardswish:
      return body(ActivationIs<Activation::hardswish>{});
    default:
      return body(ActivationIs<Activation::none>{});
  }
}

FC_INLINE const char* why_no_batch_norm(const BatchNormProblem& a) {
  if (a.N <= 0 || a.C <= 0 || a.P <= 0) return "there is nothing to normalise";
  if (a.activation != Activation::none && a.activation != Activation::relu && a.activation != Activation::relu6 &&
      a.activation != Activation::silu && a.activation != Activation::hardswish)
    return "the activation has no gradient here";
  return nullptr;
}

}  // namespace fastconv::FASTCONV_TARGET

// lstm_fwd.steps: each step is a product of the state with packed weights, and the cells of a block of units on its sums.
//
//   tile       blocks/gemm_tile.h      6 x 4 gates of a vector of units (AVX-512), 6 x 2 twice (AVX2)
//   transform  below                   the cell
//   multiply   blocks/recurrence.h
//   run        blocks/recurrent_fwd.h
#include "cpu/blocks/activation.h"
#include "cpu/blocks/recurrent_fwd.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- transform: three sigmoids and two tanh, five exponentials and five divisions a unit.
template <class T>
struct Cell {
  static constexpr int kGates = 4, kKept = 5;
  const T *gates, *bias, *c;
  T *c_last, *y, *kept;
  int64_t B, H;

  // A step reads the c that the one before it wrote.
  FC_INLINE Cell(const RecurrentProblem& a, const RecurrentArgs& args, const T*, int64_t step)
      : gates(static_cast<const T*>(args.gates)),
        bias(static_cast<const T*>(args.bias)),
        c(static_cast<const T*>(step ? args.c_last : args.c)),
        c_last(static_cast<T*>(args.c_last)),
        y(static_cast<T*>(args.y)),
        kept(static_cast<T*>(args.kept)),
        B(a.B),
        H(a.H) {}

  FC_INLINE void fetch(int64_t row, int64_t place, const Units<T>& units) const {
    const T* const from = gates + (place * B + row) * kGates * H + units.unit;
    for (int gate = 0; gate < kGates; ++gate) __builtin_prefetch(from + gate * H);
  }

  FC_INLINE void operator()(const T* sums, int64_t row, int64_t place, const Units<T>& units) const {
    const int64_t at = place * B + row, unit = units.unit;
    const int n = units.n;
    vec<T> z[kGates];
#pragma GCC unroll 4
    for (int gate = 0; gate < kGates; ++gate) {
      z[gate] = load(sums + gate * kLanes<T>);
      if (bias) z[gate] = z[gate] + load_some(bias + gate * H + unit, n);
      z[gate] = z[gate] + load_some(gates + (at * kGates + gate) * H + unit, n);
    }
    const vec<T> i = sigmoid(z[0]), f = sigmoid(z[1]), g = tanh(z[2]), o = sigmoid(z[3]);
    const vec<T> next = fma(f, load_some(c + row * H + unit, n), i * g);
    store_some(c_last + row * H + unit, next, n);
    store_some(y + at * H + unit, o * tanh(next), n);
    if (!kept) return;
    const vec<T> all[kKept] = {i, f, g, o, next};
#pragma GCC unroll 5
    for (int k = 0; k < kKept; ++k) store_some(kept + (at * kKept + k) * H + unit, all[k], n);
  }
};

// --- run
template <class T>
void run(const RecurrentProblem& a, const RecurrentArgs& args, const Context& context) {
  run_steps<T, Cell<T>>(a, args, context);
}

// --- contract
template <class T>
double cost(const RecurrentProblem& a, const Machine& machine) {
  return steps_cost<T>(a, Cell<T>::kGates, machine);
}

template <class T>
constexpr Kernel<RecurrentProblem> kKernel = {1.0f, steps_reject, cost<T>, steps_workspace<T, Cell<T>>, run<T>};

}  // namespace

extern constinit const Kernel<RecurrentProblem> lstm_fwd_steps_f32 = kKernel<float>;
extern constinit const Kernel<RecurrentProblem> lstm_fwd_steps_f64 = kKernel<double>;

}  // namespace fastconv::FASTCONV_TARGET

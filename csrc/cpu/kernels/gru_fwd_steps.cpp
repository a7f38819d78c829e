// gru_fwd.steps: each step is a product of the state with packed weights, and the cells of a block of units on its sums.
//
//   tile       blocks/gemm_tile.h      8 x 3 gates of a vector of units (AVX-512), 4 x 3 (AVX2)
//   transform  below                   the cell
//   multiply   blocks/recurrence.h
//   run        blocks/recurrent_fwd.h
#include "cpu/blocks/activation.h"
#include "cpu/blocks/recurrent_fwd.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- transform: two sigmoids and a tanh. The reset gate is applied behind the product, as in torch and cuDNN.
template <class T>
struct Cell {
  static constexpr int kGates = 3, kKept = 4;
  const T *gates, *bias, *h;
  T *y, *kept;
  int64_t B, H;

  FC_INLINE Cell(const RecurrentProblem& a, const RecurrentArgs& args, const T* state, int64_t)
      : gates(static_cast<const T*>(args.gates)),
        bias(static_cast<const T*>(args.bias)),
        h(state),
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
    vec<T> p[kGates], x[kGates];
#pragma GCC unroll 3
    for (int gate = 0; gate < kGates; ++gate) {
      p[gate] = load(sums + gate * kLanes<T>);
      if (bias) p[gate] = p[gate] + load_some(bias + gate * H + unit, n);
      x[gate] = load_some(gates + (at * kGates + gate) * H + unit, n);
    }
    const vec<T> r = sigmoid(p[0] + x[0]), z = sigmoid(p[1] + x[1]), next = tanh(fma(r, p[2], x[2]));
    store_some(y + at * H + unit, fma(z, load_some(h + row * H + unit, n) - next, next), n);
    if (!kept) return;
    const vec<T> all[kKept] = {r, z, next, p[2]};
#pragma GCC unroll 4
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

extern constinit const Kernel<RecurrentProblem> gru_fwd_steps_f32 = kKernel<float>;
extern constinit const Kernel<RecurrentProblem> gru_fwd_steps_f64 = kKernel<double>;

}  // namespace fastconv::FASTCONV_TARGET

// lstm_bwd.steps: from the last step to the first, the gradients of a step's gates times packed weights, and the cells'
// derivatives on the sums of a block of units. Gradients of weights, bias and inputs are single products over all steps, of which
// none is here.
//
//   tile       blocks/gemm_tile.h      6 x 4 vectors of units (AVX-512), 4 x 3 (AVX2)
//   transform  below                   the cell's derivative
//   multiply   blocks/recurrence.h
//   run        blocks/recurrent_bwd.h
#include "cpu/blocks/activation.h"
#include "cpu/blocks/recurrent_bwd.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- transform: with s' = s (1 - s) and tanh' = 1 - tanh^2, of which forward kept the values.
template <class T>
struct Cell {
  static constexpr int kGates = 4, kKept = 5;
  const T *kept, *c, *dy, *dc_last;
  T *dgates, *dh, *dc;
  int64_t B, H, c_step, place;

  // dc runs through the memory of its result. A step's c is kept, and that before the first is given.
  FC_INLINE Cell(const RecurrentProblem& a, const RecurrentArgs& args, int64_t step)
      : kept(static_cast<const T*>(args.kept)),
        c(static_cast<const T*>(args.c)),
        dy(static_cast<const T*>(args.dy)),
        dc_last(static_cast<const T*>(step == a.L - 1 ? args.dc_last : args.dc)),
        dgates(static_cast<T*>(args.dgates)),
        dh(static_cast<T*>(args.dh)),
        dc(static_cast<T*>(args.dc)),
        B(a.B),
        H(a.H),
        c_step(a.H),
        place(place_of(a, step)) {
    if (step > 0) {
      c = kept + (place_of(a, step - 1) * B * kKept + kKept - 1) * H;
      c_step = kKept * H;
    }
  }

  FC_INLINE const T* dproduct() const { return dgates; }

  FC_INLINE void fetch(int64_t row, const Units<T>& units) const {
    const int64_t at = place * B + row;
    for (int i = 0; i < kKept; ++i) __builtin_prefetch(kept + (at * kKept + i) * H + units.unit);
    __builtin_prefetch(dy + at * H + units.unit);
  }

  FC_INLINE void operator()(const T* sum, int64_t row, const Units<T>& units) const {
    const int64_t at = place * B + row, unit = units.unit;
    const int n = units.n;
    const vec<T> one = set1(T(1));
    vec<T> k[kKept];
#pragma GCC unroll 5
    for (int i = 0; i < kKept; ++i) k[i] = load_some(kept + (at * kKept + i) * H + unit, n);
    const vec<T> i = k[0], f = k[1], g = k[2], o = k[3], tanh_c = tanh(k[4]);
    vec<T> d = load_some(dy + at * H + unit, n);
    if (sum) d = d + load(sum);
    const vec<T> through_o = d * o;
    vec<T> into_c = through_o - through_o * tanh_c * tanh_c;
    if (dc_last) into_c = into_c + load_some(dc_last + row * H + unit, n);
    const vec<T> before = load_some(c + row * c_step + unit, n);
    const vec<T> all[kGates] = {into_c * g * (i * (one - i)), into_c * before * (f * (one - f)), into_c * i * (one - g * g),
                                d * tanh_c * (o * (one - o))};
#pragma GCC unroll 4
    for (int gate = 0; gate < kGates; ++gate) store_some(dgates + (at * kGates + gate) * H + unit, all[gate], n);
    store_some(dc + row * H + unit, into_c * f, n);
  }

  FC_INLINE void first(const T* sum, int64_t row, const Units<T>& units) const {
    store_some(dh + row * H + units.unit, load(sum), units.n);
  }
};

// --- run
template <class T>
void run(const RecurrentProblem& a, const RecurrentArgs& args, const Context& context) {
  run_steps_back<T, Cell<T>>(a, args, context);
}

// --- contract
template <class T>
double cost(const RecurrentProblem& a, const Machine& machine) {
  return steps_cost<T>(a, Cell<T>::kGates, machine);
}

template <class T>
constexpr Kernel<RecurrentProblem> kKernel = {1.0f, steps_reject, cost<T>, steps_back_workspace<T, Cell<T>>, run<T>};

}  // namespace

extern constinit const Kernel<RecurrentProblem> lstm_bwd_steps_f32 = kKernel<float>;
extern constinit const Kernel<RecurrentProblem> lstm_bwd_steps_f64 = kKernel<double>;

}  // namespace fastconv::FASTCONV_TARGET

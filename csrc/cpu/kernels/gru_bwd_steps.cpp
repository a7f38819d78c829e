// gru_bwd.steps: from the last step to the first, the gradients of a step's products times packed weights, and the cells'
// derivatives on the sums of a block of units. Gradients of weights, bias and inputs are single products over all steps, of which
// none is here.
//
//   tile       blocks/gemm_tile.h      6 x 4 vectors of units (AVX-512), 4 x 3 (AVX2)
//   transform  below                   the cell's derivative
//   multiply   blocks/recurrence.h
//   run        blocks/recurrent_bwd.h
#include "cpu/blocks/recurrent_bwd.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- transform: with s' = s (1 - s) and tanh' = 1 - tanh^2, of which forward kept the values.
template <class T>
struct Cell {
  static constexpr int kGates = 3, kKept = 4;
  const T *kept, *h, *dy;
  T *dgates, *dproducts, *dh;
  int64_t B, H, place;
  bool last;

  // What z passes on of the state's gradient runs through the memory of its result.
  FC_INLINE Cell(const RecurrentProblem& a, const RecurrentArgs& args, int64_t step)
      : kept(static_cast<const T*>(args.kept)),
        h(step > 0 ? static_cast<const T*>(args.y) + place_of(a, step - 1) * a.B * a.H : static_cast<const T*>(args.h)),
        dy(static_cast<const T*>(args.dy)),
        dgates(static_cast<T*>(args.dgates)),
        dproducts(static_cast<T*>(args.dproduct)),
        dh(static_cast<T*>(args.dh)),
        B(a.B),
        H(a.H),
        place(place_of(a, step)),
        last(step == a.L - 1) {}

  FC_INLINE const T* dproduct() const { return dproducts; }

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
#pragma GCC unroll 4
    for (int i = 0; i < kKept; ++i) k[i] = load_some(kept + (at * kKept + i) * H + unit, n);
    const vec<T> r = k[0], z = k[1], next = k[2], product = k[3];
    vec<T> d = load_some(dy + at * H + unit, n);
    if (!last) d = d + (load(sum) + load_some(dh + row * H + unit, n));
    const vec<T> into_n = d * (one - z) * (one - next * next);
    const vec<T> into_r = into_n * product * (r * (one - r));
    const vec<T> into_z = d * (load_some(h + row * H + unit, n) - next) * (z * (one - z));
    const auto write = [&](T* to, vec<T> third) {
      to += at * kGates * H + unit;
      store_some(to, into_r, n);
      store_some(to + H, into_z, n);
      store_some(to + 2 * H, third, n);
    };
    write(dgates, into_n);
    write(dproducts, into_n * r);
    store_some(dh + row * H + unit, d * z, n);
  }

  FC_INLINE void first(const T* sum, int64_t row, const Units<T>& units) const {
    T* const to = dh + row * H + units.unit;
    store_some(to, load_some(to, units.n) + load(sum), units.n);
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

extern constinit const Kernel<RecurrentProblem> gru_bwd_steps_f32 = kKernel<float>;
extern constinit const Kernel<RecurrentProblem> gru_bwd_steps_f64 = kKernel<double>;

}  // namespace fastconv::FASTCONV_TARGET

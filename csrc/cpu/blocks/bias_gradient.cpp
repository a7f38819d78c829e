#include "cpu/blocks/bias_gradient.h"

#include "cpu/blocks/parallel.h"

namespace fastconv::FASTCONV_TARGET {

template <class S>
void bias_gradient(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context) {
  using T = compute_t<S>;
  constexpr int kL = kLanes<T>;
  S* bias = static_cast<S*>(args.bias);
  // A task is one vector of filters. Where channels are contiguous it is read as a vector; elsewhere filter by filter.
  parallel_ranges(context, (a.K + kL - 1) / kL, [&](int, int64_t begin, int64_t end) {
    for (int64_t k = begin * kL; k < end * kL && k < a.K; k += kL) {
      const int lanes = a.K - k < kL ? int(a.K - k) : kL;
      vec<T> sum = zero<T>();
      for (int64_t n = 0; n < a.N; ++n) {
        for (int64_t p = 0; p < a.P; ++p) {
          const S* y = static_cast<const S*>(args.y) + n * a.y.n + p * a.y.h + k * a.y.c;
          if (a.y.c == 1) {
            vec<T> row = zero<T>();
            for (int64_t q = 0; q < a.Q; ++q) row = row + load(y + q * a.y.w, lanes);
            sum = sum + row;
            continue;
          }
          for (int i = 0; i < lanes; ++i) {
            const S* row = y + i * a.y.c;
            vec<T> partial = zero<T>();
            for (int64_t q = 0; q < a.Q; q += kL) {
              const int count = a.Q - q < kL ? int(a.Q - q) : kL;
              partial = partial + (a.y.w == 1 ? load(row + q, count) : load_strided(row + q * a.y.w, a.y.w, count));
            }
            T total = T(0);
            for (int lane = 0; lane < kL; ++lane) total += partial.v[lane];
            sum.v[i] += total;
          }
        }
      }
      store(bias + k, sum, lanes);
    }
  });
}

template void bias_gradient<float>(const Conv2dProblem&, const Conv2dArgs&, const Context&);
template void bias_gradient<double>(const Conv2dProblem&, const Conv2dArgs&, const Context&);
template void bias_gradient<bf16>(const Conv2dProblem&, const Conv2dArgs&, const Context&);
template void bias_gradient<f16>(const Conv2dProblem&, const Conv2dArgs&, const Context&);

}  // namespace fastconv::FASTCONV_TARGET

#include "cpu/blocks/input_gradient.h"

#include "cpu/blocks/activation.h"
#include "cpu/blocks/parallel.h"

namespace fastconv::FASTCONV_TARGET {

template <class S>
void fill_phase(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context) {
  using T = compute_t<S>;
  // Along whichever of channels and columns is contiguous; neither is when a phase takes every other column of NCHW.
  const bool across_channels = a.y.c == 1;
  const int64_t length = across_channels ? a.K : a.Q, step = across_channels ? a.y.c : a.y.w;
  const int64_t lines = across_channels ? a.Q : a.K, line_step = across_channels ? a.y.w : a.y.c;
  parallel_ranges(context, a.N * a.P * lines, [&](int, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t line = i % lines, p = i / lines % a.P, n = i / lines / a.P;
      const int64_t offset = n * a.y.n + p * a.y.h + line * line_step;
      for (int64_t j = 0; j < length; j += kLanes<T>) {
        const int count = length - j < kLanes<T> ? int(length - j) : kLanes<T>;
        vec<T> value = zero<T>();
        if (a.epilogue.bias) {
          const S* bias = static_cast<const S*>(args.bias);
          value = across_channels ? load(bias + j, count) : set1(wide(bias[line]));
        }
        if (a.epilogue.residual) {
          value = value + load_strided(static_cast<const S*>(args.residual) + offset + j * step, step, count);
        }
        value = activate(a.epilogue.activation, value);
        S* y = static_cast<S*>(args.y) + offset + j * step;
        step == 1 ? store(y, value, count) : store_strided(y, step, value, count);
      }
    }
  });
}

template void fill_phase<float>(const Conv2dProblem&, const Conv2dArgs&, const Context&);
template void fill_phase<double>(const Conv2dProblem&, const Conv2dArgs&, const Context&);
template void fill_phase<bf16>(const Conv2dProblem&, const Conv2dArgs&, const Context&);
template void fill_phase<f16>(const Conv2dProblem&, const Conv2dArgs&, const Context&);

}  // namespace fastconv::FASTCONV_TARGET

#include "cpu/blocks/avx512_bf16/pair_columns.h"
#include "cpu/blocks/avx512_bf16/pair_tile.h"

namespace fastconv::FASTCONV_TARGET {

void pack_pairs(const PairSource& source, int64_t filters, int64_t width, bf16* panel) {
  constexpr int kL = kLanes<float>;
  const int64_t depth = source.depth, row = 2 * width;
  for (int64_t k = 0; k < width; k += kL) {
    const int lanes = filters - k < 0 ? 0 : filters - k < kL ? int(filters - k) : kL;
    const bf16* w = source.w + k * source.k_step;
    bf16* const out = panel + 2 * k;
    if (source.d_step == 1) {
      for_each_pair_column(w, source.k_step, lanes, depth,
                           [&](int64_t i, vec<float> column) { store(reinterpret_cast<float*>(out + i * row), column); });
    } else if (source.k_step == 1) {
      for (int64_t d = 0; d < depth; d += 2, w += 2 * source.d_step) {
        const half_lanes none = _mm256_setzero_si256();
        const half_lanes lower = lanes == kL ? load_halves(w) : load_halves(w, 0, lanes);
        const half_lanes upper = d + 1 == depth ? none
                                 : lanes == kL  ? load_halves(w + source.d_step)
                                                : load_halves(w + source.d_step, 0, lanes);
        store(reinterpret_cast<float*>(out + d / 2 * row), pair_up(lower, upper));
      }
    } else {
      for (int64_t d = 0; d < depth; d += 2) {
        bf16* const to = out + d / 2 * row;
        for (int m = 0; m < kL; ++m) {
          const bf16* from = w + m * source.k_step + d * source.d_step;
          to[2 * m] = m < lanes ? from[0] : bf16{0};
          to[2 * m + 1] = m < lanes && d + 1 < depth ? from[source.d_step] : bf16{0};
        }
      }
    }
  }
}

}  // namespace fastconv::FASTCONV_TARGET

#include "cpu/blocks/filter_panel.h"

#include "cpu/blocks/columns.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// Positions of one filter plane that a lookup table covers: 11x11 fits. Larger filters are gathered.
constexpr int64_t kMaxPlane = 128;

// Where the taps lie between their least and their greatest offset: tap_at[offset - least], or -1.
struct Plane {
  int64_t least, span;
  int16_t tap_at[kMaxPlane];
};

template <class S>
bool find_plane(const FilterSource<S>& source, Plane& plane) {
  int64_t least = source.t_offset[0], greatest = least;
  for (int64_t t = 1; t < source.taps; ++t) {
    least = source.t_offset[t] < least ? source.t_offset[t] : least;
    greatest = source.t_offset[t] > greatest ? source.t_offset[t] : greatest;
  }
  plane.least = least;
  plane.span = greatest - least + 1;
  if (plane.span > kMaxPlane) return false;
  for (int64_t i = 0; i < plane.span; ++i) plane.tap_at[i] = -1;
  for (int64_t t = 0; t < source.taps; ++t) {
    int16_t& tap = plane.tap_at[source.t_offset[t] - least];
    // An expanded filter has several taps in one place, and the table room for one.
    if (tap >= 0) return false;
    tap = int16_t(t);
  }
  return true;
}

// Channels from a row of filters to its fetching: each is on a page of its own. 1000 -> 2048 features packed at 6 GB/s without
// it.
constexpr int64_t kRowsAhead = 8;

// Where a channel's filters are neighbours, as in Linear's input gradient.
template <class S>
void copy_rows(const FilterSource<S>& source, int64_t filters, int64_t width, compute_t<S>* panel) {
  constexpr int kL = kLanes<compute_t<S>>;
  for (int64_t t = 0; t < source.taps; ++t) {
    const S* row = source.w + source.t_offset[t];
    for (int64_t c = 0; c < source.channels; ++c, row += source.c_step, panel += width) {
      for (int64_t k = 0; k < width; k += kL) {
        __builtin_prefetch(row + k + kRowsAhead * source.c_step);
        store(panel + k, load(row + k, filters - k < 0 ? 0 : filters - k < kL ? int(filters - k) : kL));
      }
    }
  }
}

}  // namespace

template <class S>
void pack_filters(const FilterSource<S>& source, int64_t filters, int64_t width, compute_t<S>* panel) {
  using T = compute_t<S>;
  constexpr int kL = kLanes<T>;
  if (source.k_step == 1) return copy_rows(source, filters, width, panel);
  Plane plane;
  const bool contiguous_channels = source.c_step == 1;
  const bool has_plane = !contiguous_channels && find_plane(source, plane);
  // All channels and taps of a filter in one run: torch's contiguous weights, forward.
  const bool one_run = has_plane && plane.span == source.c_step;

  for (int64_t k = 0; k < width; k += kL) {
    const int lanes = filters - k < 0 ? 0 : filters - k < kL ? int(filters - k) : kL;
    const S* w = source.w + k * source.k_step;
    T* out = panel + k;
    const auto at = [&](int64_t t, int64_t c) { return out + (t * source.channels + c) * width; };

    if (contiguous_channels) {
      for (int64_t t = 0; t < source.taps; ++t) {
        for_each_column(w + source.t_offset[t], source.k_step, lanes, source.channels,
                        [&](int64_t c, vec<T> column) { store(at(t, c), column); });
      }
    } else if (one_run) {
      // Where the positions of a block go, relative to the channel it starts in; a block is at most kL positions long.
      int64_t offset[kMaxPlane + kL];
      for (int64_t i = 0; i < plane.span + kL; ++i) {
        const int64_t t = plane.tap_at[i % plane.span];
        offset[i] = t < 0 ? -1 : (t * source.channels + i / plane.span) * width;
      }
      int64_t position = 0;
      for_each_block(w + plane.least, source.k_step, lanes, source.channels * source.c_step,
                     [&](int64_t, int n, const vec<T>(&block)[kL]) {
                       for (int m = 0; m < n; ++m) {
                         if (offset[position + m] >= 0) store(out + offset[position + m], block[m]);
                       }
                       for (position += n; position >= plane.span; position -= plane.span) out += width;
                     });
    } else if (has_plane) {
      for (int64_t c = 0; c < source.channels; ++c) {
        for_each_column(w + c * source.c_step + plane.least, source.k_step, lanes, plane.span, [&](int64_t i, vec<T> column) {
          const int64_t t = plane.tap_at[i];
          if (t >= 0) store(at(t, c), column);
        });
      }
    } else {
      for (int64_t t = 0; t < source.taps; ++t) {
        for (int64_t c = 0; c < source.channels; ++c) {
          store(at(t, c), load_strided(w + c * source.c_step + source.t_offset[t], source.k_step, lanes));
        }
      }
    }
  }
}

template void pack_filters(const FilterSource<float>&, int64_t, int64_t, float*);
template void pack_filters(const FilterSource<double>&, int64_t, int64_t, double*);
template void pack_filters(const FilterSource<bf16>&, int64_t, int64_t, float*);
template void pack_filters(const FilterSource<f16>&, int64_t, int64_t, float*);

}  // namespace fastconv::FASTCONV_TARGET

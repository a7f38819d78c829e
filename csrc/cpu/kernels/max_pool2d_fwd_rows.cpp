// max_pool2d_fwd.rows: NCHW. Vectors run along the output row; the maximum is taken along the row first, then down the column.
//
// Rows first, because then both steps meet the candidates in the order (r, s): the first of equals and the last NaN win in each
// step, hence in both. A row's maxima are kept while any window still needs them, so each input row is read and reduced once.
#include "cpu/blocks/parallel.h"
#include "cpu/blocks/pool_rows.h"

namespace fastconv::FASTCONV_TARGET {
namespace {

// --- tile: a ring of row maxima, one slot for each row that a window can span, in L1 for the usual windows.
//
// A 3x3 window over 112 columns, stride 2: 3 slots (4 with the power of two) of 64 maxima and 64 indices = 2 KB, and one row
// split into 2 phases of 80 columns.
struct Ring {
  int64_t slots;    // a power of two, at least the rows from the first tap of a window to its last
  int64_t pitch;    // elements of a slot
  int64_t columns;  // of the phases
};
template <class T>
FC_INLINE Ring make_ring(const Pool2dProblem& a) {
  int64_t slots = 1;
  while (slots < (a.R - 1) * a.dilation_h + 1) slots *= 2;
  return {slots, pool_round_up(a.Q, kLanes<T>), phase_layout<T>(a).size()};
}

template <class T>
struct Scratch {
  using Int = typename int_of<T>::type;
  T *phases, *values;  // (stride, pitch), (slots, pitch)
  Int* indices;        // (slots, pitch)
  int64_t* rows;       // (slots): which row of which plane a slot holds
};
template <class T>
FC_INLINE int64_t scratch_bytes(const Ring& ring) {
  return pool_round_up((ring.columns + 2 * ring.slots * ring.pitch) * int64_t(sizeof(T)) + ring.slots * 8, 64);
}
// What all threads read: for each tap of a row its place in the phases, for each output its window's first valid column.
template <class T>
FC_INLINE int64_t shared_bytes(const Pool2dProblem& a, const Ring& ring) {
  return pool_round_up(a.S * 8 + ring.pitch * int64_t(sizeof(T)), 64);
}
template <class T>
FC_INLINE Scratch<T> make_scratch(const Ring& ring, char* memory) {
  Scratch<T> s;
  s.phases = reinterpret_cast<T*>(memory);
  s.values = s.phases + ring.columns;
  s.indices = reinterpret_cast<typename Scratch<T>::Int*>(s.values + ring.slots * ring.pitch);
  s.rows = reinterpret_cast<int64_t*>(s.indices + ring.slots * ring.pitch);
  fill(s.phases, ring.columns, kPoolLowest<T>);
  fill(s.rows, ring.slots, int64_t(-1));
  return s;
}

// --- transform: a row into phases, with -inf for padding (never larger than anything, so never chosen).
template <class T>
FC_INLINE void transform(const PhaseLayout& layout, T* phases, const T* x_row) {
  split_row(layout, phases, [x_row](int64_t w, int n) { return load_up_to(x_row + w, n); });
}

// --- reduce: along the row, one vector of outputs at a time; `first` holds what a window of nothing but -inf answers.
template <bool kIndices, class T>
FC_INLINE void reduce_row(const Pool2dProblem& a, const T* phases, const int64_t* taps, const typename int_of<T>::type* first,
                          int64_t h, T* values, typename int_of<T>::type* indices) {
  using Int = typename int_of<T>::type;
  const index_vec<T> dilation = index_set1<T>(Int(a.dilation_w));
  for (int64_t q = 0; q < a.Q; q += kLanes<T>) {
    vec<T> best = set1(kPoolLowest<T>);
    if constexpr (kIndices) {
      index_vec<T> at =
          index_iota<T>() * index_set1<T>(Int(a.stride_w)) + index_set1<T>(Int(h * a.W + q * a.stride_w - a.pad_left));
      index_vec<T> index = index_load<T>(first + q) + index_set1<T>(Int(h * a.W));
      for (int64_t s = 0; s < a.S; ++s) {
        const vec<T> value = load(phases + taps[s] + q);
        const mask<T> wins = pool_wins(value, best);
        best = blend(wins, value, best);
        index = blend(wins, at, index);
        at = at + dilation;
      }
      index_store<T>(indices + q, index);
    } else {
      for (int64_t s = 0; s < a.S; ++s) best = pool_max(load(phases + taps[s] + q), best);
    }
    store(values + q, best);
  }
}

// Down the column: the same rule, on the maxima of the rows.
template <bool kIndices, class T>
FC_INLINE void reduce_column(const Pool2dProblem& a, const Ring& ring, const Scratch<T>& s, const PoolWindow& rows, T* y,
                             int64_t* indices) {
  for (int64_t q = 0; q < a.Q; q += kLanes<T>) {
    const int n = int(a.Q - q < kLanes<T> ? a.Q - q : kLanes<T>);
    const int64_t slot = (rows.begin & (ring.slots - 1)) * ring.pitch + q;
    vec<T> best = load(s.values + slot);
    index_vec<T> index{};
    if constexpr (kIndices) index = index_load<T>(s.indices + slot);
    for (int64_t h = rows.begin + rows.step; h < rows.end; h += rows.step) {
      const int64_t next = (h & (ring.slots - 1)) * ring.pitch + q;
      const vec<T> value = load(s.values + next);
      if constexpr (kIndices) {
        const mask<T> wins = pool_wins(value, best);
        best = blend(wins, value, best);
        index = blend(wins, index_load<T>(s.indices + next), index);
      } else {
        best = pool_max(value, best);
      }
    }
    store_up_to(y + q, best, n);
    if constexpr (kIndices) store_indices(indices + q, index, n);
  }
}

// --- run: one task is one output row; the rows it needs that the ring does not hold are reduced first.
template <bool kIndices, class T>
void run_rows(const Pool2dProblem& a, const Pool2dArgs& args, const Context& context) {
  using Int = typename int_of<T>::type;
  const Ring ring = make_ring<T>(a);
  const PhaseLayout layout = phase_layout<T>(a);
  int64_t* const taps = static_cast<int64_t*>(context.workspace);
  Int* const first = reinterpret_cast<Int*>(taps + a.S);
  for (int64_t s = 0; s < a.S; ++s) taps[s] = layout.tap(s * a.dilation_w);
  for (int64_t q = 0; q < ring.pitch; ++q) first[q] = q < a.Q ? Int(pool_window(pool_axis_w(a), q).begin) : 0;
  char* const scratches = static_cast<char*>(context.workspace) + shared_bytes<T>(a, ring);

  parallel_ranges(context, a.N * a.C * a.P, [&](int thread, int64_t begin, int64_t end) {
    const Scratch<T> scratch = make_scratch<T>(ring, scratches + thread * scratch_bytes<T>(ring));
    PoolPlace at(begin, a.C, a.P);
    for (int64_t task = begin; task < end; ++task, at.advance(a.C, a.P)) {
      const PoolWindow rows = pool_window(pool_axis_h(a), at.row);
      const T* plane = static_cast<const T*>(args.x) + at.n * a.x.n + at.c * a.x.c;
      for (int64_t h = rows.begin; h < rows.end; h += rows.step) {
        const int64_t slot = h & (ring.slots - 1), row = at.plane * a.H + h;
        if (scratch.rows[slot] == row) continue;
        scratch.rows[slot] = row;
        transform(layout, scratch.phases, plane + h * a.x.h);
        reduce_row<kIndices>(a, scratch.phases, taps, first, h, scratch.values + slot * ring.pitch,
                             scratch.indices + slot * ring.pitch);
      }
      const int64_t offset = at.n * a.y.n + at.c * a.y.c + at.row * a.y.h;
      reduce_column<kIndices>(a, ring, scratch, rows, static_cast<T*>(args.y) + offset,
                              kIndices ? args.indices + offset : nullptr);
    }
  });
}

template <class T>
void run(const Pool2dProblem& problem, const Pool2dArgs& args, const Context& context) {
  const Pool2dProblem a = pool_regular(problem);
  if (args.indices) {
    run_rows<true, T>(a, args, context);
  } else {
    run_rows<false, T>(a, args, context);
  }
}

// --- contract
constexpr int64_t kMostScratch = 512 * 1024;  // half of the smallest L2 that has AVX-512

template <class T>
const char* reject(const Pool2dProblem& problem) {
  const Pool2dProblem a = pool_regular(problem);
  if (a.adaptive) return "the adaptive windows have different sizes";
  if (a.x.w != 1 || a.y.w != 1) return "the rows of x and y are not dense";
  if (a.pad_top < 0 || a.pad_left < 0) return "the padding is negative";
  if (a.H > INT32_MAX / a.W) return "the plane has 2^31 positions or more";
  if (pool_has_empty_window(a)) return "a window lies wholly in the padding";
  if (scratch_bytes<T>(make_ring<T>(a)) > kMostScratch) return "the rows of one window exceed the L2";
  return nullptr;
}

// Per output row, as measured (AVX-512): 50 cycles for each new row (stride_h of them, at most R) besides its vectors, 8 for each
// row of the window. Rows shorter than a vector waste lanes.
template <class T>
double cost(const Pool2dProblem& problem, const Machine& machine) {
  const Pool2dProblem a = pool_regular(problem);
  const double vectors = double(pool_ceil_div(a.Q, kLanes<T>));
  const double new_rows = double(a.stride_h < a.R ? a.stride_h : a.R);
  const double split = a.stride_w < 3 ? 3.0 * double(a.stride_w) : 3.0 * double(a.stride_w * kLanes<T>);
  const double row = new_rows * (50 + vectors * (split + 2 * double(a.S))) + 8 * double(a.R) + vectors * (5 + 2 * double(a.R));
  return pool_seconds(double(a.N * a.C * a.P) * row, machine);
}

template <class T>
int64_t workspace(const Pool2dProblem& problem, const Machine& machine) {
  const Pool2dProblem a = pool_regular(problem);
  const Ring ring = make_ring<T>(a);
  return shared_bytes<T>(a, ring) + machine.threads * scratch_bytes<T>(ring);
}

template <class T>
constexpr Kernel<Pool2dProblem> kKernel = {1.0f, reject<T>, cost<T>, workspace<T>, run<T>};

}  // namespace

extern constinit const Kernel<Pool2dProblem> max_pool2d_fwd_rows_f32 = kKernel<float>;
extern constinit const Kernel<Pool2dProblem> max_pool2d_fwd_rows_f64 = kKernel<double>;

}  // namespace fastconv::FASTCONV_TARGET

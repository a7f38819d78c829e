#include "core/parallel.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <mutex>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace fastconv {
namespace {

// libgomp's worker threads do not exist in a forked child, but its bookkeeping says that they do: the next parallel region would
// wait for them for ever. torch hangs there; a DataLoader worker that calls fastconv must not.
std::atomic<bool> in_forked_child{false};

}  // namespace

void watch_forks() {
  static std::once_flag once;
  std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { in_forked_child.store(true, std::memory_order_relaxed); }); });
}

void parallel_ranges(int threads, int64_t count, void (*body)(void* arg, int thread, int64_t begin, int64_t end), void* arg) {
  if (count <= 0) return;
#ifdef _OPENMP
  const int team = int(std::min<int64_t>(threads, count));
  if (team > 1 && !omp_in_parallel() && !in_forked_child.load(std::memory_order_relaxed)) {
#pragma omp parallel num_threads(team)
    {
      // The team may be smaller than asked for (OMP_THREAD_LIMIT), so the ranges come from its real size.
      const int size = omp_get_num_threads(), thread = omp_get_thread_num();
      const int64_t begin = count * thread / size, end = count * (thread + 1) / size;
      if (begin < end) body(arg, thread, begin, end);
    }
    return;
  }
#else
  (void)threads;
#endif
  body(arg, 0, 0, count);
}

}  // namespace fastconv

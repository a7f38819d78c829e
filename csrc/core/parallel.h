// The only threads in the project: OpenMP, so that one pool serves torch and fastconv.
#pragma once

#include <cstdint>

namespace fastconv {

// Calls body(arg, thread, begin, end) on up to `threads` threads; their ranges are contiguous, cover 0..count once, and thread <
// threads. Serial (thread 0, the whole range) inside another parallel region and in a forked child, whose copy of the OpenMP pool
// does not exist. A kernel must give the same bits for every number of threads: share outputs out, never a sum.
void parallel_ranges(int threads, int64_t count, void (*body)(void* arg, int thread, int64_t begin, int64_t end), void* arg);

// From now on parallel_ranges notices forks. Called when the module is loaded: torch may have filled the pool and the process may
// fork before fastconv's first parallel region.
void watch_forks();

}  // namespace fastconv

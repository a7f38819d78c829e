// Races: two threads at the same bytes, at least one of them writing, and nothing that puts one before the other.
//
// The kernels are compiled with -fsanitize=thread, which calls a hook before every access to memory that another thread could
// see. ThreadSanitizer's library is not linked: the hooks are in races.cpp. They ask what the CUDA model says orders two
// accesses, not in which order the emulator ran them, so one run finds the races of every schedule of the accesses that it makes:
//
//  * all accesses before a block's barrier come before all that follow it,
//  * all accesses of a warp before __syncwarp() come before those of the warp that follow it. Shuffles, votes, ldmatrix and
//    mma.sync wait for all lanes, and promise nothing about memory,
//  * what cp.async brings is being written until its thread has waited for it, and is that thread's write then.
//
// Shared memory knows who wrote and who read; of global memory is known who wrote, so that a read before another thread's write
// is not seen where it ran first. Blocks of one launch are never in order.
#pragma once

#include <cstddef>
#include <cstdint>

// Of the emulator's own functions: what they touch is no access of the kernel.
#define FC_UNSEEN __attribute__((no_sanitize("thread")))

namespace emulator::races {

#ifdef FASTCONV_RACES

// While it lives, accesses are watched but those to `stacks`. Nothing is known of memory when it begins.
class Launch {
 public:
  Launch(const void* stacks, size_t stack_bytes);
  ~Launch();
};
void begin_block(unsigned block, const void* shared, size_t shared_bytes);
// All threads of the block have come to a barrier.
void pass_barrier();

// What the running thread does at `where` in its code.
void read(const void* bytes, size_t count, const void* where);
void start_copy(const void* to, size_t count, const void* where);
void finish_copy(const void* to, size_t count, const void* where);

#else

struct Launch {
  Launch(const void*, size_t) {}
  ~Launch() {}
};
inline void begin_block(unsigned, const void*, size_t) {}
inline void pass_barrier() {}
inline void read(const void*, size_t, const void*) {}
inline void start_copy(const void*, size_t, const void*) {}
inline void finish_copy(const void*, size_t, const void*) {}

#endif

}  // namespace emulator::races

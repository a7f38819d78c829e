// Asynchronous copies from global to shared memory (PTX ISA, cp.async), 16 bytes at a time, which pass no register.
//
// A thread's copies belong to groups that it closes one after another; waiting is for groups, and other threads see what was
// copied after a barrier that follows the wait.
#pragma once

#include "cuda/blocks/device.h"

namespace fastconv::sm80 {

// Starts to copy 16 bytes, or to write 16 zero bytes where they do not exist; then `from` is not read, but must be an address.
FC_DEVICE void copy_async(void* to, const void* from, bool exists) {
#ifdef FASTCONV_EMULATED
  ::emulator::start_copy(to, from, exists);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(unsigned(__cvta_generic_to_shared(to))), "l"(from),
               "r"(exists ? 16 : 0)
               : "memory");
#endif
}

// Closes the group of the copies started since the last one was closed. A group may be empty.
FC_DEVICE void close_copies() {
#ifdef FASTCONV_EMULATED
  ::emulator::close_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until all closed groups but the last kPending have arrived.
template <int kPending>
FC_DEVICE void wait_for_copies() {
#ifdef FASTCONV_EMULATED
  ::emulator::finish_copies(kPending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

}  // namespace fastconv::sm80

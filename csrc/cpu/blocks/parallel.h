// core/parallel for lambdas: the trampoline lives here so that its symbol belongs to this ISA.
#pragma once

#include "core/kernel.h"
#include "core/parallel.h"
#include "cpu/simd/vec.h"

namespace fastconv::FASTCONV_TARGET {

// body(thread, begin, end) over contiguous ranges of 0..count.
template <class Body>
FC_INLINE void parallel_ranges(const Context& context, int64_t count, const Body& body) {
  fastconv::parallel_ranges(
      context.machine->threads, count,
      [](void* arg, int thread, int64_t begin, int64_t end) { (*static_cast<const Body*>(arg))(thread, begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace fastconv::FASTCONV_TARGET

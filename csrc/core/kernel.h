// What an answer looks like. A kernel is plain constant data: no virtuals, no registration object, nothing that runs at load.
#pragma once

#include "core/machine.h"
#include "core/problem.h"

namespace fastconv {

// What a running kernel gets besides its operands.
struct Context {
  const Machine* machine;
  void* workspace;  // Kernel::workspace bytes, 64-byte aligned, not initialised
};

// Filters in a kernel's own order. Kernels with one name may use several orders; filters of one shape have the same bytes in each
// `arrangement`, whatever the images.
struct PackedFilters {
  int64_t bytes, arrangement;
};

template <class Problem>
struct Kernel {
  // Worst error against float64, in units of what a plain sum in the same precision makes. 1 for everything but Winograd.
  float error_growth;
  // nullptr: this problem is accepted. Otherwise one sentence, without a full stop, that says why not.
  const char* (*reject)(const Problem&);
  // Predicted seconds on this machine. Only ever compared, so what matters is the order.
  double (*cost)(const Problem&, const Machine&);
  // Bytes of scratch that run() needs, for machine.threads threads.
  int64_t (*workspace)(const Problem&, const Machine&);
  void (*run)(const Problem&, const typename Problem::Args&, const Context&);
  // Where filters can be kept packed between calls: how, and the packing itself, into 64-byte aligned memory. run() gives the
  // same bits with them as without.
  PackedFilters (*packed)(const Problem&) = nullptr;
  void (*pack)(const Problem&, const void* w, void* packed) = nullptr;
};

}  // namespace fastconv

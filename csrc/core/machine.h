// The machine as data: what selection and blocking are allowed to know about it.
#pragma once

#include <cstdint>

namespace fastconv {

// Where a kernel may run: one bit for each instruction set this project compiles for. `scalar` is the baseline; `avx512_bf16` is
// avx512 with VDPBF16PS, for the few kernels that use it; `sm80` is a GPU of compute capability 8.0 or later.
enum Isa : uint32_t { kIsaScalar = 1, kIsaAvx2 = 2, kIsaAvx512 = 4, kIsaSm80 = 8, kIsaAvx512Bf16 = 16 };

// Where the operands of a call lie: a GPU's number, or one of these.
enum Device : int32_t { kCpu = -1, kAnyGpu = -2 };

struct Machine {
  uint32_t isa;      // Isa bits that this CPU has and FASTCONV_ISA allows
  int32_t threads;   // threads of this call
  int64_t l1_bytes;  // data cache of one core
  int64_t l2_bytes;  // of one core
  int64_t l3_bytes;  // shared; 0 when unknown
};

}  // namespace fastconv

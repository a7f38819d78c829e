// Finding out what machine this is. Split from machine.h, which the ISA objects include and which therefore holds only data.
#pragma once

#include <string>
#include <vector>

#include "core/machine.h"

namespace fastconv {

struct MachineInfo {
  Machine machine;     // isa: found and allowed
  uint32_t isa_found;  // found, before FASTCONV_ISA
  int32_t cores;
  std::string cpu;  // brand string
};

// Detected once; FASTCONV_ISA=scalar|avx2|avx512|avx512_bf16 (at most that one) is read at the same time.
const MachineInfo& machine_info();

// Overrides FASTCONV_ISA from now on; "" lifts the limit. Throws std::invalid_argument for an unknown name.
void set_isa_limit(const std::string& name);

const char* isa_name(Isa isa);
std::vector<std::string> isa_names(uint32_t bits);

}  // namespace fastconv

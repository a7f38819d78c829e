// Every kernel of kernels.def as a row of data.
#pragma once

#include <string>
#include <variant>
#include <vector>

#include "core/kernel.h"

namespace fastconv {

struct Row {
  const char *op, *algorithm, *dtype, *target;
  std::string name;  // op.algorithm.dtype.target
  Isa isa;
  std::variant<const Kernel<Conv2dProblem>*, const Kernel<Pool2dProblem>*, const Kernel<SdpaProblem>*, const Kernel<NormProblem>*,
               const Kernel<BatchNormProblem>*, const Kernel<RecurrentProblem>*>
      kernel;
};

// In the order of kernels.def, which is also the order of preference between equal costs.
const std::vector<Row>& rows();

// "" when the row may run on this machine, otherwise why not.
std::string why_not_runnable(const Row& row);

// The same for operands on `device` (see Device). No driver is asked about a row that is not for that kind of device.
std::string why_not_runnable(const Row& row, int device);

}  // namespace fastconv

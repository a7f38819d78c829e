#include "core/registry.h"

#include "core/gpu.h"
#include "core/machine_info.h"

namespace fastconv {

// Which problem an op asks. A new op is one line here.
using conv2d_fwd_problem = Conv2dProblem;
using conv2d_dgrad_problem = Conv2dProblem;
using conv2d_wgrad_problem = Conv2dProblem;
using max_pool2d_fwd_problem = Pool2dProblem;
using max_pool2d_bwd_problem = Pool2dProblem;
using avg_pool2d_fwd_problem = Pool2dProblem;
using avg_pool2d_bwd_problem = Pool2dProblem;
using sdpa_fwd_problem = SdpaProblem;
using sdpa_bwd_problem = SdpaProblem;
using layer_norm_fwd_problem = NormProblem;
using layer_norm_bwd_problem = NormProblem;
using batch_norm_fwd_problem = BatchNormProblem;
using batch_norm_bwd_problem = BatchNormProblem;
using lstm_fwd_problem = RecurrentProblem;
using lstm_bwd_problem = RecurrentProblem;
using gru_fwd_problem = RecurrentProblem;
using gru_bwd_problem = RecurrentProblem;

// kernels.def is read once for each target that this build has: first to declare the constants, then to list them.
#define FC_SYMBOL(op, algorithm, dtype) op##_##algorithm##_##dtype
#define FC_DECLARE(op, algorithm, dtype) extern const Kernel<op##_problem> FC_SYMBOL(op, algorithm, dtype);
#define FC_LIST(op, algorithm, dtype, target, isa) \
  Row{#op, #algorithm, #dtype, #target, #op "." #algorithm "." #dtype "." #target, isa, &target::FC_SYMBOL(op, algorithm, dtype)},

#define FC_KERNEL(op, algorithm, dtype, targets) FC_DECLARE(op, algorithm, dtype)
namespace scalar {
#include "kernels.def"
}
#ifdef FASTCONV_AVX2
namespace avx2 {
#include "kernels.def"
}
#define FC_ROWS_AVX2(op, algorithm, dtype) FC_LIST(op, algorithm, dtype, avx2, kIsaAvx2)
#else
#define FC_ROWS_AVX2(op, algorithm, dtype)
#endif
#ifdef FASTCONV_AVX512
namespace avx512 {
#include "kernels.def"
}
#define FC_ROWS_AVX512(op, algorithm, dtype) FC_LIST(op, algorithm, dtype, avx512, kIsaAvx512)
#else
#define FC_ROWS_AVX512(op, algorithm, dtype)
#endif
#ifdef FASTCONV_AVX512_BF16
namespace avx512_bf16 {
#include "kernels.def"
}
#define FC_ROWS_AVX512_BF16(op, algorithm, dtype) FC_LIST(op, algorithm, dtype, avx512_bf16, kIsaAvx512Bf16)
#else
#define FC_ROWS_AVX512_BF16(op, algorithm, dtype)
#endif
#ifdef FASTCONV_CUDA
namespace sm80 {
#include "kernels.def"
}
#define FC_ROWS_SM80(op, algorithm, dtype) FC_LIST(op, algorithm, dtype, sm80, kIsaSm80)
#else
#define FC_ROWS_SM80(op, algorithm, dtype)
#endif
#undef FC_KERNEL

#define FC_ROWS_CPU(op, algorithm, dtype) \
  FC_ROWS_AVX512(op, algorithm, dtype)    \
  FC_ROWS_AVX2(op, algorithm, dtype)      \
  FC_LIST(op, algorithm, dtype, scalar, kIsaScalar)

const std::vector<Row>& rows() {
  static const std::vector<Row> table = {
#define FC_KERNEL(op, algorithm, dtype, targets) FC_ROWS_##targets(op, algorithm, dtype)
#include "kernels.def"
#undef FC_KERNEL
  };
  return table;
}

std::string why_not_runnable(const Row& row) { return why_not_runnable(row, row.isa == kIsaSm80 ? kAnyGpu : kCpu); }

std::string why_not_runnable(const Row& row, int device) {
  const bool for_gpu = row.isa == kIsaSm80;
  if (for_gpu != (device != kCpu)) return for_gpu ? "the operands are not on a GPU" : "the operands are not on the CPU";
  if (for_gpu) return why_not_on_gpu(device);
  const MachineInfo& info = machine_info();
  if (!(info.isa_found & row.isa)) return std::string("this CPU has no ") + row.target;
  if (!(info.machine.isa & row.isa)) return std::string("FASTCONV_ISA forbids ") + row.target;
  return "";
}

}  // namespace fastconv

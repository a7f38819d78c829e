// The SM80 rows of kernels.def, for fastconv.testing.emulator to call through ctypes.
#include <iterator>
#include <string>

#include "core/kernel.h"
#include "emulator.h"

namespace fastconv {

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

namespace sm80 {
#define FC_DECLARE_CPU(op, algorithm, dtype)
#define FC_DECLARE_AVX512_BF16(op, algorithm, dtype)
#define FC_DECLARE_SM80(op, algorithm, dtype) extern const Kernel<op##_problem> op##_##algorithm##_##dtype;
#define FC_KERNEL(op, algorithm, dtype, targets) FC_DECLARE_##targets(op, algorithm, dtype)
#include "kernels.def"
#undef FC_KERNEL
}  // namespace sm80

namespace {

const Machine kMachine = {};

// A kernel whose problem's type is forgotten, as a C caller sees it.
struct Row {
  const char* name;
  float error_growth;
  const void* kernel;
  const char* (*reject)(const void* kernel, const void* problem);
  double (*cost)(const void* kernel, const void* problem);
  int64_t (*workspace)(const void* kernel, const void* problem);
  void (*run)(const void* kernel, const void* problem, const void* args, void* workspace);
};

template <class Problem>
Row row(const char* name, const Kernel<Problem>& kernel) {
  using K = const Kernel<Problem>*;
  using P = const Problem*;
  return {name,
          kernel.error_growth,
          &kernel,
          [](const void* k, const void* p) { return K(k)->reject(*P(p)); },
          [](const void* k, const void* p) { return K(k)->cost(*P(p), kMachine); },
          [](const void* k, const void* p) { return K(k)->workspace(*P(p), kMachine); },
          [](const void* k, const void* p, const void* args, void* workspace) {
            K(k)->run(*P(p), *static_cast<const typename Problem::Args*>(args), {&kMachine, workspace, 0, nullptr});
          }};
}

const Row kRows[] = {
#define FC_LIST_CPU(op, algorithm, dtype)
#define FC_LIST_AVX512_BF16(op, algorithm, dtype)
#define FC_LIST_SM80(op, algorithm, dtype) row(#op "." #algorithm "." #dtype ".sm80", sm80::op##_##algorithm##_##dtype),
#define FC_KERNEL(op, algorithm, dtype, targets) FC_LIST_##targets(op, algorithm, dtype)
#include "kernels.def"
#undef FC_KERNEL
};

}  // namespace

extern "C" {

int emulator_count() { return int(std::size(kRows)); }
const char* emulator_name(int i) { return kRows[i].name; }
double emulator_growth(int i) { return kRows[i].error_growth; }
const char* emulator_reject(int i, const void* problem) { return kRows[i].reject(kRows[i].kernel, problem); }
double emulator_cost(int i, const void* problem) { return kRows[i].cost(kRows[i].kernel, problem); }
int64_t emulator_workspace(int i, const void* problem) { return kRows[i].workspace(kRows[i].kernel, problem); }

// Of the last run.
uint64_t emulator_copies() { return emulator::copies_started(); }

// The sizes that the caller's structures must have.
int64_t emulator_size(const char* name) {
  const std::string s = name;
  return s == "conv2d"   ? sizeof(Conv2dProblem)
         : s == "pool2d" ? sizeof(Pool2dProblem)
         : s == "sdpa"   ? sizeof(SdpaProblem)
         : s == "norm"   ? sizeof(NormProblem)
                         : 0;
}

// nullptr, or what the emulator saw the kernel do wrong; good until the next call.
const char* emulator_run(int i, const void* problem, const void* args, void* workspace, uint64_t seed) {
  static std::string error;
  emulator::set_seed(seed);
  try {
    kRows[i].run(kRows[i].kernel, problem, args, workspace);
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
  return nullptr;
}

}  // extern "C"

}  // namespace fastconv

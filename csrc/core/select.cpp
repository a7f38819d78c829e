#include "core/select.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string_view>

#include "core/machine_info.h"

namespace fastconv {
namespace {

constexpr double kNever = std::numeric_limits<double>::infinity();

const char* dtype_name(Dtype dtype) {
  constexpr const char* kNames[] = {"f32", "f64", "bf16", "f16"};
  return kNames[int(dtype)];
}

bool named(const Row& row, const std::string& force) {
  return force.empty() || force == row.algorithm || force == row.target || force == row.name;
}

// How much longer a kernel takes than its model says, next to the others (core/calibration.def).
struct Calibration {
  const char *op, *algorithm, *target;
  bool channels_last;
  double factor;
};

constexpr bool nhwc = true, nchw = false;
#define FC_CALIBRATION(op, algorithm, target, layout, factor) {#op, #algorithm, #target, layout, factor},
constexpr Calibration kCalibrations[] = {
#include "core/calibration.def"
};
#undef FC_CALIBRATION

// A factor counts for the same algorithm in narrower vectors too: otherwise those would be chosen where it is large.
double calibration(const Row& row, bool channels_last) {
  const bool cpu = row.isa != kIsaSm80;
  for (const Calibration& c : kCalibrations) {
    if (c.channels_last == channels_last && row.op == std::string_view(c.op) && row.algorithm == std::string_view(c.algorithm) &&
        (cpu || row.target == std::string_view(c.target))) {
      return c.factor;
    }
  }
  return 1;
}

template <class Problem>
double calibration(const Row&, const Problem&) {
  return 1;
}
double calibration(const Row& row, const Conv2dProblem& problem) { return calibration(row, problem.x.c == 1); }

Machine machine_with(int threads) {
  Machine machine = machine_info().machine;
  machine.threads = std::max(threads, 1);
  return machine;
}

// Law 7: a sample's bits may not depend on how many others come with it, or on the threads. Algorithms sum in different orders,
// so the choice between them sees neither: costs are predicted for one thread, and for nominal batches unless the batch is what
// is summed over. One image and eight count alike, image by image: packing and transforming filters is most of the work for one
// deep image and nothing for eight. Images of one pixel are Linear's rows, which come by the dozen.
constexpr int64_t kNominalBatch = 8, kNominalRows = 64;

template <class Problem>
double nominal_cost(const std::string& op, const Kernel<Problem>& kernel, Problem problem, const Machine& machine) {
  if (op == "conv2d_wgrad") return kernel.cost(problem, machine);
  const bool rows = problem.P * problem.Q == 1;
  problem.N = rows ? kNominalRows : kNominalBatch;
  const double many = kernel.cost(problem, machine);
  problem.N = 1;
  return rows ? many : (many + double(kNominalBatch) * kernel.cost(problem, machine)) / 2;
}

double nominal_cost(const std::string&, const Kernel<SdpaProblem>& kernel, SdpaProblem problem, const Machine& machine) {
  problem.B = kNominalBatch;
  return kernel.cost(problem, machine);
}

double nominal_cost(const std::string&, const Kernel<NormProblem>& kernel, NormProblem problem, const Machine& machine) {
  problem.N = kNominalRows;
  return kernel.cost(problem, machine);
}

double nominal_cost(const std::string&, const Kernel<BatchNormProblem>& kernel, BatchNormProblem problem,
                    const Machine& machine) {
  if (!problem.training) problem.N = kNominalBatch;
  return kernel.cost(problem, machine);
}

double nominal_cost(const std::string&, const Kernel<RecurrentProblem>& kernel, RecurrentProblem problem,
                    const Machine& machine) {
  problem.B = kNominalBatch;
  return kernel.cost(problem, machine);
}

}  // namespace

template <class Problem>
std::vector<Candidate> candidates(const std::string& op, const Problem& problem, const Wish& wish) {
  const Machine machine = machine_with(1);
  std::vector<Candidate> found;
  bool op_exists = false, name_exists = false;
  for (const Row& row : rows()) {
    const auto* kernel = std::get_if<const Kernel<Problem>*>(&row.kernel);
    if (op != row.op || !kernel) continue;
    op_exists = true;
    name_exists |= named(row, wish.force);
    if (std::string(row.dtype) != dtype_name(problem.dtype)) continue;
    Candidate candidate{&row, why_not_runnable(row, wish.device), kNever};
    if (candidate.verdict.empty() && !named(row, wish.force)) candidate.verdict = "not the forced '" + wish.force + "'";
    if (candidate.verdict.empty() && wish.strict && (*kernel)->error_growth > 1) {
      candidate.verdict = "set_accuracy(\"strict\") rules it out";
      if (wish.device != kCpu) candidate.verdict = "set_accuracy(\"strict\") or torch's own switch of tf32 rules it out";
    }
    if (candidate.verdict.empty()) {
      const char* reason = (*kernel)->reject(problem);
      if (reason) {
        candidate.verdict = reason;
      } else {
        candidate.cost = calibration(row, problem) * nominal_cost(op, **kernel, problem, machine);
      }
    }
    found.push_back(std::move(candidate));
  }
  if (!op_exists) throw std::invalid_argument("no op is called '" + op + "' for this kind of problem");
  if (!name_exists) throw std::invalid_argument(op + ": no kernel, algorithm or target is called '" + wish.force + "'");
  return found;
}

template <class Problem>
Plan<Problem> choose(const std::string& op, const Problem& problem, int threads, const Wish& wish) {
  const std::vector<Candidate> all = candidates(op, problem, wish);
  const Candidate* best = nullptr;
  for (const Candidate& candidate : all) {
    if (candidate.verdict.empty() && (!best || candidate.cost < best->cost)) best = &candidate;
  }
  if (!best) {
    std::string message = op + ": no kernel takes this problem";
    if (!wish.force.empty()) message += " with '" + wish.force + "' forced";
    for (const Candidate& candidate : all) message += "\n  " + candidate.row->name + ": " + candidate.verdict;
    throw NoKernel(message);
  }
  const Machine machine = machine_with(threads);
  const auto* kernel = std::get<const Kernel<Problem>*>(best->row->kernel);
  return {best->row, kernel, problem, machine, kernel->workspace(problem, machine), wish.device};
}

template std::vector<Candidate> candidates(const std::string&, const Conv2dProblem&, const Wish&);
template std::vector<Candidate> candidates(const std::string&, const Pool2dProblem&, const Wish&);
template std::vector<Candidate> candidates(const std::string&, const SdpaProblem&, const Wish&);
template std::vector<Candidate> candidates(const std::string&, const NormProblem&, const Wish&);
template std::vector<Candidate> candidates(const std::string&, const BatchNormProblem&, const Wish&);
template std::vector<Candidate> candidates(const std::string&, const RecurrentProblem&, const Wish&);
template Plan<Conv2dProblem> choose(const std::string&, const Conv2dProblem&, int, const Wish&);
template Plan<Pool2dProblem> choose(const std::string&, const Pool2dProblem&, int, const Wish&);
template Plan<SdpaProblem> choose(const std::string&, const SdpaProblem&, int, const Wish&);
template Plan<NormProblem> choose(const std::string&, const NormProblem&, int, const Wish&);
template Plan<BatchNormProblem> choose(const std::string&, const BatchNormProblem&, int, const Wish&);
template Plan<RecurrentProblem> choose(const std::string&, const RecurrentProblem&, int, const Wish&);

}  // namespace fastconv

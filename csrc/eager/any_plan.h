// One plan for any kind of problem, so that Python holds a single class, and the scratch memory that plans run in.
#pragma once

#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <variant>

#include "core/huge_pages.h"
#include "core/select.h"
#include "eager/written.h"

namespace fastconv {

class AnyPlan {
 public:
  template <class Problem>
  explicit AnyPlan(Plan<Problem> plan) : written_(written(plan.row->op, plan.problem)), plan_(std::move(plan)) {}

  const std::string& kernel() const {
    return std::visit([](const auto& plan) -> const std::string& { return plan.row->name; }, plan_);
  }
  int64_t workspace() const {
    return std::visit([](const auto& plan) { return plan.workspace; }, plan_);
  }
  int threads() const {
    return std::visit([](const auto& plan) { return plan.machine.threads; }, plan_);
  }

  int device() const {
    return std::visit([](const auto& plan) { return plan.device; }, plan_);
  }

  double predicted_seconds() const {
    return std::visit([](const auto& plan) { return plan.kernel->cost(plan.problem, plan.machine); }, plan_);
  }

  // Filters that can be kept packed, 0 bytes where the kernel keeps none, and the packing. See Kernel::pack.
  PackedFilters packed() const {
    return std::visit([](const auto& plan) { return plan.kernel->packed ? plan.kernel->packed(plan.problem) : PackedFilters{}; },
                      plan_);
  }
  void pack(const void* w, void* packed) const {
    if (this->packed().bytes == 0) throw std::invalid_argument(kernel() + " keeps no packed filters");
    std::visit([&](const auto& plan) { plan.kernel->pack(plan.problem, w, packed); }, plan_);
  }

  // Throws std::bad_variant_access where the plan is no convolution's.
  const Plan<Conv2dProblem>& conv2d() const { return std::get<Plan<Conv2dProblem>>(plan_); }

  // Without the GIL; on a GPU it starts the work on the stream and returns. Throws std::bad_variant_access where the plan is for
  // another kind of problem.
  void run(const Conv2dArgs& args, void* workspace, void* stream = nullptr) const {
    run(std::get<Plan<Conv2dProblem>>(plan_), args, workspace, stream);
  }
  void run(const Pool2dArgs& args, void* workspace, void* stream = nullptr) const {
    run(std::get<Plan<Pool2dProblem>>(plan_), args, workspace, stream);
  }
  void run(const SdpaArgs& args, void* workspace, void* stream = nullptr) const {
    run(std::get<Plan<SdpaProblem>>(plan_), args, workspace, stream);
  }
  void run(const NormArgs& args, void* workspace, void* stream = nullptr) const {
    run(std::get<Plan<NormProblem>>(plan_), args, workspace, stream);
  }
  void run(const BatchNormArgs& args, void* workspace, void* stream = nullptr) const {
    run(std::get<Plan<BatchNormProblem>>(plan_), args, workspace, stream);
  }
  void run(const RecurrentArgs& args, void* workspace, void* stream = nullptr) const {
    run(std::get<Plan<RecurrentProblem>>(plan_), args, workspace, stream);
  }

 private:
  template <class Problem>
  void run(const Plan<Problem>& plan, const typename Problem::Args& args, void* workspace, void* stream) const {
    for (const Written& result : written_) {
      // Nobody can move the pages of a GPU's memory, and few results are so large that it matters.
      if (result.bytes >= kHugePagesFrom && plan.device == kCpu) prefer_huge_pages(pointer(args, result.operand), result.bytes);
    }
    plan.kernel->run(plan.problem, args, {&plan.machine, workspace, plan.device, stream});
  }

  // Args are nothing but pointers.
  template <class Args>
  static void* pointer(const Args& args, int operand) {
    static_assert(sizeof(Args) % sizeof(void*) == 0);
    void* found;
    std::memcpy(&found, reinterpret_cast<const char*>(&args) + size_t(operand) * sizeof found, sizeof found);
    return found;
  }

  AllWritten written_;
  std::variant<Plan<Conv2dProblem>, Plan<Pool2dProblem>, Plan<SdpaProblem>, Plan<NormProblem>, Plan<BatchNormProblem>,
               Plan<RecurrentProblem>>
      plan_;
};

}  // namespace fastconv

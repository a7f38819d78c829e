// From a problem to the kernel that runs it: target bits, then reject(), then the least cost().
#pragma once

#include <string>
#include <vector>

#include "core/registry.h"

namespace fastconv {

struct Wish {
  std::string force;    // "", an algorithm, a target, or a whole kernel name
  bool strict = false;  // never a kernel whose error_growth is above 1
  int device = kCpu;    // where the operands lie
};

struct Candidate {
  const Row* row;
  std::string verdict;  // "" when accepted
  double cost;          // seconds for a nominal batch on one thread (law 7, see select.cpp); infinity when not accepted
};

template <class Problem>
struct Plan {
  const Row* row;
  const Kernel<Problem>* kernel;
  Problem problem;
  Machine machine;  // with the thread count of the call
  int64_t workspace;
  int device;
};

// Every kernel of the op and dtype, in the order of kernels.def. Throws std::invalid_argument for an op or a forced name that
// does not exist.
template <class Problem>
std::vector<Candidate> candidates(const std::string& op, const Problem& problem, const Wish& wish);

struct NoKernel : std::exception {
  explicit NoKernel(std::string text) : message(std::move(text)) {}
  const char* what() const noexcept override { return message.c_str(); }
  std::string message;
};

// The accepted candidate of least cost. Throws NoKernel, with the table of verdicts, if there is none.
template <class Problem>
Plan<Problem> choose(const std::string& op, const Problem& problem, int threads, const Wish& wish);

}  // namespace fastconv

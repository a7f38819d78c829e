#include "core/cascade.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "core/dtype_size.h"
#include "core/huge_pages.h"
#include "core/parallel.h"

namespace fastconv {
namespace {

// What a band leaves between the convolutions may take so much of the L2; the rest is for the filters, the image and the result.
// A quarter, a third and 0.7 of 1 MB made MobileNetV2 as fast to 2 %.
constexpr double kShareOfL2 = 0.5;

constexpr int64_t kLine = 64;

// Where a plan is asked for: all rows are there.
constexpr int32_t kNothing = -1;

int64_t lines(int64_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

bool same(const Stride4& a, const Stride4& b) { return a.n == b.n && a.c == b.c && a.h == b.h && a.w == b.w; }

[[noreturn]] void refuse(const char* reason) { throw NoKernel(reason); }

char* at(void* memory, int64_t bytes) { return static_cast<char*>(memory) + bytes; }

}  // namespace

Cascade::Cascade(std::vector<Plan<Conv2dProblem>> plans) : whole_(std::move(plans)) {
  check();
  const Conv2dProblem& last = whole_.back().problem;
  const Machine& machine = whole_.front().machine;
  const auto stages = whole_.size();
  threads_ = machine.threads;
  const auto budget = int64_t(kShareOfL2 * double(machine.l2_bytes));
  std::vector<int64_t> most_rows;
  const auto bytes = [&] {
    int64_t sum = 0;
    for (std::size_t s = 0; s + 1 < stages; ++s) {
      const Conv2dProblem& p = whole_[s].problem;
      sum += lines(most_rows[s] * p.y.h * size_of(p.dtype));
    }
    return sum;
  };
  for (int64_t bands = 1;; ++bands) {
    rows_ = (last.P + bands - 1) / bands;
    most_rows.assign(stages, 0);
    bands_.clear();
    stage_of_.clear();
    program({0, last.P}, rows_, &most_rows);
    if (bands == 1 && bytes() <= machine.l2_bytes) refuse("what lies between the convolutions fits the L2");
    if (bytes() <= budget) break;
    if (rows_ == 1) refuse("one row of what lies between the convolutions takes too much of the L2");
  }
  // Threads take parts of an image only where there are fewer images: at the start of a part rows are computed twice.
  const int64_t parts = std::min((threads_ + last.N - 1) / last.N, (last.P + rows_ - 1) / rows_);
  bands_.clear();
  stage_of_.clear();
  for (int64_t part = 0; part < parts; ++part) {
    programs_.push_back(program({last.P * part / parts, last.P * (part + 1) / parts}, rows_, &most_rows));
  }
  for (std::size_t s = 0; s + 1 < stages; ++s) {
    const Conv2dProblem& p = whole_[s].problem;
    const int64_t row_bytes = p.y.h * size_of(p.dtype);
    between_.push_back({kernel_offset_, row_bytes});
    kernel_offset_ += lines(most_rows[s] * row_bytes);
  }
  int64_t kernels = 0;
  for (const auto& plan : bands_) kernels = std::max(kernels, plan.workspace);
  thread_bytes_ = kernel_offset_ + lines(kernels);
}

void Cascade::check() const {
  if (whole_.size() < 2) refuse("a cascade has two convolutions at least");
  for (std::size_t s = 0; s < whole_.size(); ++s) {
    const auto& [row, kernel, p, machine, workspace, device] = whole_[s];
    if (device != kCpu) refuse("a cascade runs on the CPU");
    if (row->op != "conv2d_fwd" || (row->algorithm != "pointwise" && row->algorithm != "depthwise")) {
      refuse("a cascade is of pointwise and depthwise convolutions");
    }
    if (p.y.c != 1 || p.x.c != 1) refuse("a cascade's images are channels_last");
    if (s + 1 < whole_.size() && p.epilogue.residual) refuse("only the last convolution of a cascade may add a residual");
    if (s == 0) continue;
    const Conv2dProblem& before = whole_[s - 1].problem;
    if (before.dtype != p.dtype || before.N != p.N || before.K != p.C || before.P != p.H || before.Q != p.W ||
        !same(before.y, p.x)) {
      refuse("a convolution does not take what the one before it makes");
    }
  }
}

// The calls that make rows `out` of the last convolution, `height` at a time; `most_rows` grows to what lies between them.
Cascade::Program Cascade::program(Rows out, int64_t height, std::vector<int64_t>* most_rows) {
  const auto stages = int32_t(whole_.size());
  const auto read = [&](int32_t stage, Rows rows) {
    const Conv2dProblem& p = whole_[std::size_t(stage)].problem;
    return Rows{std::max<int64_t>(0, rows.begin * p.stride_h - p.pad_top),
                std::min(p.H, (rows.end - 1) * p.stride_h - p.pad_top + (p.R - 1) * p.dilation_h + 1)};
  };
  Program steps;
  std::vector<Rows> needed(std::size_t(stages), Rows{0, 0}), there = needed;
  for (int64_t begin = out.begin; begin < out.end; begin += height) {
    needed.back() = {begin, std::min(begin + height, out.end)};
    for (int32_t s = stages - 1; s > 0; --s) needed[std::size_t(s - 1)] = read(s, needed[std::size_t(s)]);
    for (int32_t s = 0; s < stages; ++s) {
      const Rows need = needed[std::size_t(s)];
      Rows& have = there[std::size_t(s)];
      Step step{s, kNothing, 0, 0, 0, 0};
      Rows made = need;
      if (s + 1 < stages) {
        if (need.size() <= 0) refuse("a band reads nothing but padding");
        if (have.end > need.begin) {
          step.moved_from = need.begin - have.begin;
          step.moved = have.end - need.begin;
          made.begin = have.end;
        }
        have = need;
        most_rows->at(std::size_t(s)) = std::max(most_rows->at(std::size_t(s)), need.size());
      } else {
        have = {0, 0};
      }
      if (made.size() > 0) {
        const Rows in = read(s, made);
        if (in.size() <= 0) refuse("a band reads nothing but padding");
        step.in_row = in.begin - (s ? there[std::size_t(s - 1)].begin : 0);
        step.out_row = made.begin - have.begin;
        step.plan = plan_for(s, in, made);
      }
      steps.push_back(step);
    }
  }
  return steps;
}

int32_t Cascade::plan_for(int32_t stage, Rows in, Rows out) {
  Plan<Conv2dProblem> plan = whole_[std::size_t(stage)];
  Conv2dProblem& p = plan.problem;
  p.pad_top = in.begin - (out.begin * p.stride_h - p.pad_top);
  p.N = 1;
  p.H = in.size();
  p.P = out.size();
  for (std::size_t i = 0; i < bands_.size(); ++i) {
    const Conv2dProblem& known = bands_[i].problem;
    if (stage_of_[i] == stage && known.H == p.H && known.P == p.P && known.pad_top == p.pad_top) return int32_t(i);
  }
  const auto& kernel = *plan.kernel;
  if (kernel.reject(p)) refuse("a kernel does not take bands of its image");
  if (kernel.packed && kernel.packed(p).arrangement != kernel.packed(whole_[std::size_t(stage)].problem).arrangement) {
    refuse("a kernel wants other filters for bands of its image");
  }
  plan.machine.threads = 1;
  plan.workspace = kernel.workspace(p, plan.machine);
  bands_.push_back(plan);
  stage_of_.push_back(stage);
  return int32_t(bands_.size() - 1);
}

void Cascade::run_program(const Program& program, const std::vector<Conv2dArgs>& args, int64_t sample, char* scratch) const {
  const Conv2dProblem &first = whole_.front().problem, &last = whole_.back().problem;
  const int64_t size = size_of(first.dtype);
  const auto stages = args.size();
  for (const Step& step : program) {
    const auto s = std::size_t(step.stage);
    Conv2dArgs given = args[s];
    if (s == 0) {
      given.x = at(given.x, (sample * first.x.n + step.in_row * first.x.h) * size);
    } else {
      given.x = scratch + between_[s - 1].offset + step.in_row * between_[s - 1].row_bytes;
    }
    if (s + 1 < stages) {
      const auto [offset, row_bytes] = between_[s];
      char* const rows = scratch + offset;
      if (step.moved_from) std::memmove(rows, rows + step.moved_from * row_bytes, std::size_t(step.moved * row_bytes));
      given.y = rows + step.out_row * row_bytes;
    } else {
      const int64_t skipped = (sample * last.y.n + step.out_row * last.y.h) * size;
      given.y = at(given.y, skipped);
      if (given.residual) given.residual = at(given.residual, skipped);
    }
    if (step.plan == kNothing) continue;
    const auto& plan = bands_[std::size_t(step.plan)];
    plan.kernel->run(plan.problem, given, {&plan.machine, scratch + kernel_offset_});
  }
}

void Cascade::run(const std::vector<Conv2dArgs>& args, void* workspace) const {
  if (args.size() != whole_.size()) throw std::invalid_argument("a cascade takes the operands of each of its convolutions");
  const Conv2dProblem& last = whole_.back().problem;
  const int64_t bytes = last.N * last.P * last.y.h * size_of(last.dtype);
  if (bytes >= kHugePagesFrom) prefer_huge_pages(args.back().y, bytes);
  const auto parts = int64_t(programs_.size());
  struct Shared {
    const Cascade* cascade;
    const std::vector<Conv2dArgs>* args;
    char* scratch;
    int64_t parts;
  } shared{this, &args, static_cast<char*>(workspace), parts};
  parallel_ranges(
      threads_, last.N * parts,
      [](void* arg, int thread, int64_t begin, int64_t end) {
        const auto& s = *static_cast<Shared*>(arg);
        for (int64_t i = begin; i < end; ++i) {
          s.cascade->run_program(s.cascade->programs_[std::size_t(i % s.parts)], *s.args, i / s.parts,
                                 s.scratch + thread * s.cascade->thread_bytes_);
        }
      },
      &shared);
}

}  // namespace fastconv

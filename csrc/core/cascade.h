// Convolutions one after the other, band by band.
#pragma once

#include <cstdint>
#include <vector>

#include "core/select.h"

namespace fastconv {

// Pointwise and depthwise convolutions of channels-last images, each of the one before's result, that run on one band of rows
// after the other: what lies between them stays in the L2 and is never whole. The rows that two bands share are kept, so nothing
// is computed twice (Alwani, Chen, Ferdman, Milder, "Fused-Layer CNN Accelerators", 2016).
//
// The kernels are those of the whole images, and the bits too: they depend on no other rows.
class Cascade {
 public:
  // Plans of the whole images. Throws NoKernel, with the reason, where they make no cascade or none that would gain anything.
  explicit Cascade(std::vector<Plan<Conv2dProblem>> plans);

  // Of the last convolution, in one band.
  int64_t rows() const { return rows_; }
  // Bytes of scratch for all threads.
  int64_t workspace() const { return int64_t(threads_) * thread_bytes_; }

  // For each convolution w, bias and packed; x of the first, y and residual of the last.
  void run(const std::vector<Conv2dArgs>& args, void* workspace) const;

 private:
  // Where a convolution's result lies: whole in y for the last, otherwise some rows of it in scratch.
  struct Rows {
    int64_t begin, end;
    int64_t size() const { return end - begin; }
  };
  // One call of a kernel, after rows that are needed again were moved to the start of the memory that it writes to.
  struct Step {
    int32_t stage, plan;
    int64_t moved_from, moved;  // rows
    int64_t in_row, out_row;    // first row read and written, counted from the start of that memory
  };
  using Program = std::vector<Step>;
  struct Memory {
    int64_t offset, row_bytes;
  };

  void check() const;
  Program program(Rows out, int64_t height, std::vector<int64_t>* most_rows);
  int32_t plan_for(int32_t stage, Rows in, Rows out);
  void run_program(const Program& program, const std::vector<Conv2dArgs>& args, int64_t sample, char* scratch) const;

  std::vector<Plan<Conv2dProblem>> whole_, bands_;
  std::vector<int32_t> stage_of_;  // of each of bands_
  std::vector<Program> programs_;  // by the part of an image that a thread takes
  std::vector<Memory> between_;    // behind each convolution but the last
  int64_t rows_ = 0, thread_bytes_ = 0, kernel_offset_ = 0;
  int threads_ = 1;
};

}  // namespace fastconv

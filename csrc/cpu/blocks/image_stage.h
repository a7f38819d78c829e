// NCHW by way of NHWC, for kernels that share their work out themselves: some samples, or rows of one, are transposed into
// scratch, answered there by a kernel for channels_last, and transposed back. pixel_stage.h does so for a thread and a block of
// groups at a time, which dense convolutions have not.
//
// A transpose is a quarter of a shuffle for each element, in and out, and a 3x3 filter of 64 channels 36 FMAs for each element of
// y: cheap, where a stride makes every vector of pixels that im2col packs two loads, a shuffle and the masks of two rows' ends,
// for each tap of its own.
#pragma once

#include "cpu/blocks/pixel_stage.h"

namespace fastconv::FASTCONV_TARGET {

// What x and y of a part may take for each thread. Filters are packed for every part, so that it should have hundreds of pixels:
// of 512 channels of 14x14 maps, these are eight samples. More than the L2, but lines come from behind it as quickly as they are
// used. Of all threads together: half of the scratch that is kept between calls.
inline constexpr int64_t kImageStageBytes = 4 << 20, kMostImageStageBytes = 8 << 20;

// Samples n .. n + problem.N, or rows of sample n, as a problem of its own in NHWC.
struct ImagePart {
  Conv2dProblem problem;
  int64_t n, h, p;  // the first sample, row of x and row of y
  Stride4 x, y;     // of the planes: a 1x1 filter's stride is left behind with the pixels that it skips
};

template <class T>
class ImageStage {
 public:
  FC_INLINE ImageStage(const Conv2dProblem& a, bool rows_of_x, int threads)
      : a_(a), rows_of_x_(rows_of_x), samples_(a.N, 1), rows_(rows_of_x ? a.H : a.P, rows_of_x ? a.H : a.P) {
    const int64_t x_row = a.C * a.W * int64_t(sizeof(T)), y_row = a.K * a.Q * int64_t(sizeof(T));
    const int64_t sample = x_row * a.H + y_row * a.P;
    const int64_t most = clamp(kImageStageBytes * threads, 0, kMostImageStageBytes);
    if (2 * sample <= most) {
      samples_ = EvenSplit(a.N, most / sample);
    } else if (sample > most) {
      const int64_t row = rows_of_x ? x_row + y_row / a.stride_h : y_row + x_row * a.stride_h;
      rows_ = EvenSplit(rows_.count, clamp(most / row, 1, rows_.count));
    }
  }

  FC_INLINE int64_t parts() const { return samples_.parts * rows_.parts; }

  FC_INLINE ImagePart part(int64_t index) const {
    const int64_t sample = index / rows_.parts, begin = rows_.begin(index % rows_.parts), size = rows_.size(index % rows_.parts);
    const StageRows rows = stage_rows(a_, rows_of_x_, begin, begin + size);
    ImagePart part = {a_, samples_.begin(sample), rows.h, rows.p, a_.x, a_.y};
    Conv2dProblem& b = part.problem;
    b.N = samples_.size(sample), b.H = rows.h_end - rows.h, b.P = rows.p_end - rows.p;
    b.pad_top = a_.pad_top - rows.p * a_.stride_h + rows.h;
    if (!rows_of_x_ && a_.R * a_.S == 1 && a_.pad_top == 0 && a_.pad_left == 0) {
      part.x.h *= a_.stride_h, part.x.w *= a_.stride_w;
      b.H = b.P, b.W = b.Q;
      b.stride_h = b.stride_w = 1;
    }
    b.x = {b.H * b.W * b.C, 1, b.W * b.C, b.C};
    b.y = {b.P * b.Q * b.K, 1, b.Q * b.K, b.K};
    leave_residual(a_, b);
    return part;
  }

 private:
  const Conv2dProblem& a_;
  bool rows_of_x_;
  EvenSplit samples_, rows_;
};

// One of a part's two tensors: as planes and as pixels.
struct StagedImage {
  Stride4 planes, pixels;
  int64_t channels, rows, columns;
};

FC_INLINE int64_t image_x_size(const Conv2dProblem& b) { return b.N * b.x.n; }
FC_INLINE int64_t image_y_size(const Conv2dProblem& b) { return b.N * b.y.n; }

// All of a problem as it looks on the stage: what filters kept packed have to fit.
template <class T>
FC_INLINE Conv2dProblem image_problem(const Conv2dProblem& a) {
  return ImageStage<T>(a, false, 1).part(0).problem;
}

template <class T, auto kWorkspace>
StageSizes image_sizes(const ImageStage<T>& stage, const Machine& machine) {
  StageSizes most = {0, 0, 0};
  for (int64_t i = 0; i < stage.parts(); ++i) {
    const Conv2dProblem b = stage.part(i).problem;
    // Behind the last pixel a vector is read.
    most = larger(most, {image_x_size(b) + kLanes<T>, image_y_size(b) + kLanes<T>, kWorkspace(b, machine)});
  }
  return most;
}

// kRun answers the same op on the part, forward or (kInputGradient) input gradient.
template <class T, bool kInputGradient, auto kRun, auto kWorkspace>
void image_stage_run(const Conv2dProblem& a, const Conv2dArgs& args, const Context& context) {
  const ImageStage<T> stage(a, kInputGradient, context.machine->threads);
  Arena arena(context.workspace);
  const StageScratch<T> scratch(image_sizes<T, kWorkspace>(stage, *context.machine), arena);
  Context inner = context;
  inner.workspace = scratch.inner;
  // Rows of all samples of a part, in runs of one sample.
  const auto for_each_run = [&](int64_t samples, int64_t rows, const auto& move) {
    parallel_ranges(context, samples * rows, [&](int, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end;) {
        const int64_t row = i % rows, count = rows - row < end - i ? rows - row : end - i;
        move(i / rows, row, count);
        i += count;
      }
    });
  };
  for (int64_t i = 0; i < stage.parts(); ++i) {
    const ImagePart part = stage.part(i);
    const Conv2dProblem& b = part.problem;
    Conv2dArgs sub = args;
    sub.x = scratch.x, sub.y = scratch.y, sub.residual = nullptr;
    const int64_t x_first = part.n * a.x.n + part.h * a.x.h, y_first = part.n * a.y.n + part.p * a.y.h;
    const StagedImage image_x = {part.x, b.x, b.C, b.H, b.W}, image_y = {part.y, b.y, b.K, b.P, b.Q};
    // Into scratch, and back with what is left of the epilogue.
    const auto in = [&](const StagedImage& image, const void* planes, int64_t first, T* pixels) {
      for_each_run(b.N, image.rows, [&](int64_t n, int64_t row, int64_t count) {
        planes_to_pixels(static_cast<const T*>(planes) + first + n * image.planes.n + row * image.planes.h, image.planes,
                         image.channels, count, image.columns, pixels + n * image.pixels.n + row * image.pixels.h,
                         image.pixels.w);
      });
    };
    const auto out = [&](const StagedImage& image, const T* pixels, void* planes, int64_t first) {
      const T* residual = a.epilogue.residual ? static_cast<const T*>(args.residual) : nullptr;
      for_each_run(b.N, image.rows, [&](int64_t n, int64_t row, int64_t count) {
        const int64_t at = first + n * image.planes.n + row * image.planes.h;
        pixels_to_planes(pixels + n * image.pixels.n + row * image.pixels.h, image.pixels.w, image.planes, image.channels, count,
                         image.columns, static_cast<T*>(planes) + at, residual ? residual + at : nullptr,
                         residual ? a.epilogue.activation : Activation::none);
      });
    };
    if constexpr (kInputGradient) {
      in(image_y, args.y, y_first, scratch.y);
      kRun(b, sub, inner);
      out(image_x, scratch.x, args.x, x_first);
    } else {
      in(image_x, args.x, x_first, scratch.x);
      kRun(b, sub, inner);
      out(image_y, scratch.y, args.y, y_first);
    }
  }
}

template <class T, bool kInputGradient, auto kWorkspace>
int64_t image_stage_workspace(const Conv2dProblem& a, const Machine& machine) {
  return stage_scratch_bytes<T>(image_sizes<T, kWorkspace>(ImageStage<T>(a, kInputGradient, machine.threads), machine));
}

// kCost of all parts, and what it takes to bring them there and back.
template <class T, bool kInputGradient, auto kCost>
double image_stage_cost(const Conv2dProblem& a, const Machine& machine) {
  const ImageStage<T> stage(a, kInputGradient, machine.threads);
  const Conv2dProblem b = stage.part(0).problem;
  // Three channels take as long as sixteen.
  const double x = double(b.H) * double(b.W) * double(round_up(b.C, kLanes<T>));
  const double y = double(b.P) * double(b.Q) * double(round_up(b.K, kLanes<T>));
  // Cycles for a vector that passes through the stage: 7 where all lies in caches, and scratch that goes through the L2.
  const double seconds = 18 * double(b.N) * (x + y) / kLanes<T> / (3e9 * machine.threads);
  return double(stage.parts()) * (kCost(b, machine) + seconds);
}

}  // namespace fastconv::FASTCONV_TARGET

// What every .cu file starts from: the namespace, inline functions for both sides, and how a kernel is launched.
//
// A kernel is launched by launch() and never by <<<>>>, and takes its shared memory from shared_memory(): both are plain C++, so
// a host compiler can read every .cu file. tests/cuda_emulator does, and gives the CUDA names a meaning there.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "core/kernel.h"

#define FASTCONV_TARGET sm80
// An object has its file's kernels of every dtype, or of one where the build compiles the file once for each (cmake/cuda.cmake).
#ifndef FASTCONV_ONE_DTYPE
#define FASTCONV_F32
#define FASTCONV_F16
#define FASTCONV_BF16
#endif
#define FC_INLINE __host__ __device__ __forceinline__
#define FC_DEVICE __device__ __forceinline__

#ifdef FASTCONV_EMULATED
#define FC_UNROLL
#else
#define FC_UNROLL _Pragma("unroll")
#endif

namespace fastconv::sm80 {

// A warp's lanes are the unit that loads memory together.
inline constexpr int kWarp = 32;

// --- shared memory

// The block's dynamic shared memory, as the one struct that a kernel lays out in it. Not initialised.
template <class Layout>
FC_DEVICE Layout& shared_memory() {
#ifdef FASTCONV_EMULATED
  return *static_cast<Layout*>(::emulator::self().shared_memory);
#else
  extern __shared__ __align__(128) unsigned char fastconv_shared_memory[];
  return *reinterpret_cast<Layout*>(fastconv_shared_memory);
#endif
}

// --- launching

// In a debug build each launch waits for its kernel, so that what goes wrong there is reported at the call that did it.
#ifdef NDEBUG
inline constexpr bool kWaitForKernels = false;
#else
inline constexpr bool kWaitForKernels = true;
#endif

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(error));
}

// Throws what went wrong in kernels of the stream. One that is being captured runs nothing yet, and may not be waited for.
inline void check_kernels(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
  if (status == cudaStreamCaptureStatusNone) check_cuda(cudaStreamSynchronize(stream), "a kernel, or one before it");
}

// The device of a call is current while this lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check_cuda(cudaGetDevice(&before_), "cudaGetDevice");
    if (device != before_) {
      check_cuda(cudaSetDevice(device), "cudaSetDevice");
      changed_ = true;
    }
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

template <class T>
struct Given {
  using type = T;
};

// Starts blocks x threads threads on the call's stream and device. Throws std::runtime_error where the launch is refused; what
// goes wrong while it runs is CUDA's to report, at the next synchronisation, which a debug build makes here.
template <class... Parameters>
void launch(const Context& context, void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes,
            typename Given<Parameters>::type... arguments) {
  if (blocks == 0) return;
  if (blocks > 0x7FFFFFFF) throw std::runtime_error("CUDA: a grid of more than 2^31 blocks");
  const DeviceGuard guard(context.device);
  // Beyond 48 KB a kernel has to ask.
  if (shared_bytes > 48 << 10) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)), "shared memory");
  }
  cudaLaunchConfig_t config{};
  config.gridDim.x = unsigned(blocks);
  config.blockDim.x = unsigned(threads);
  config.dynamicSmemBytes = size_t(shared_bytes);
  config.stream = static_cast<cudaStream_t>(context.stream);
  check_cuda(cudaLaunchKernelEx(&config, kernel, arguments...), "launch");
  if constexpr (kWaitForKernels) check_kernels(config.stream);
}

}  // namespace fastconv::sm80

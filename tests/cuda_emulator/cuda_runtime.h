// Stands in for the toolkit's header of this name where a host compiler reads the .cu files: the language's extensions and the
// few functions of the runtime that the kernels use. Grids and blocks are one-dimensional, as the project's all are.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "emulator.h"
#include "warp_instructions.h"

#define FASTCONV_EMULATED
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)

namespace emulator {

// Objects and no macros, for cudaLaunchConfig_t has members of these names.
template <Index Thread::* kWhich>
struct Builtin {
  struct {
    FC_UNSEEN operator unsigned() const { return (self().*kWhich).x; }
  } x;
};

}  // namespace emulator

inline constexpr emulator::Builtin<&emulator::Thread::thread> threadIdx{};
inline constexpr emulator::Builtin<&emulator::Thread::block> blockIdx{};
inline constexpr emulator::Builtin<&emulator::Thread::block_size> blockDim{};
inline constexpr emulator::Builtin<&emulator::Thread::grid_size> gridDim{};

#define FC_SITE (::emulator::Site{__FILE__, __LINE__})
#define __syncthreads() ::emulator::wait_for_block(FC_SITE)
#define __shfl_xor_sync(mask, value, bits) ::emulator::shuffle_xor(mask, value, bits, FC_SITE)
#define __shfl_sync(mask, value, from) ::emulator::shuffle(mask, value, from, FC_SITE)
#define __ballot_sync(mask, vote) ::emulator::ballot(mask, vote, FC_SITE)
#define __any_sync(mask, vote) (::emulator::ballot(mask, vote, FC_SITE) != 0)
#define __syncwarp() ::emulator::sync_warp(FC_SITE)

namespace emulator {

inline void need_full(unsigned mask) {
  if (mask != 0xFFFFFFFFu) fail("collective instruction with a partial mask, which the emulator has not");
}

template <class T>
FC_UNSEEN T shuffle_xor(unsigned mask, T value, int bits, Site site) {
  need_full(mask);
  return exchange(value, site).lane[(self().thread.x % kWarp) ^ unsigned(bits)];
}

template <class T>
FC_UNSEEN T shuffle(unsigned mask, T value, int from, Site site) {
  need_full(mask);
  return exchange(value, site).lane[from % kWarp];
}

FC_UNSEEN inline unsigned ballot(unsigned mask, bool vote, Site site) {
  need_full(mask);
  const Warp<bool> votes = exchange(vote, site);
  unsigned bits = 0;
  for (int i = 0; i < kWarp; ++i) bits |= unsigned(votes.lane[i]) << i;
  return bits;
}

// Dynamic shared memory beyond this must have been asked for, and beyond that no device of sm_80 has it.
constexpr size_t kSharedByDefault = 48 << 10, kSharedAtMost = 163 << 10;

template <class Kernel>
size_t& shared_limit(Kernel) {
  static size_t limit = kSharedByDefault;
  return limit;
}

}  // namespace emulator

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone = 0 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "invalid argument"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidValue; }
// A launch has run when it returns, and nothing is captured.
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int value) {
  if (value < 0 || size_t(value) > emulator::kSharedAtMost) return cudaErrorInvalidValue;
  emulator::shared_limit(kernel) = std::max(emulator::shared_limit(kernel), size_t(value));
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), const Arguments&... arguments) {
  const bool flat = config->gridDim.y == 1 && config->gridDim.z == 1 && config->blockDim.y == 1 && config->blockDim.z == 1;
  if (!flat || config->gridDim.x == 0 || config->gridDim.x > 0x7FFFFFFF || config->blockDim.x == 0 || config->blockDim.x > 1024 ||
      config->dynamicSmemBytes > emulator::shared_limit(kernel)) {
    return cudaErrorInvalidValue;
  }
  emulator::run_grid(config->gridDim.x, config->blockDim.x, config->dynamicSmemBytes, [&] { kernel(arguments...); });
  return cudaSuccess;
}

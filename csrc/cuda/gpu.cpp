// What the CUDA runtime says about the GPUs of this machine. The runtime is linked statically and loads the driver when it is
// first asked, so that importing the module needs none.
#include "core/gpu.h"

#include <cuda_runtime_api.h>

#include "core/machine.h"

namespace fastconv {
namespace {

std::string why_not_on(int device) {
  int major = 0, minor = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error != cudaSuccess) {
    cudaGetLastError();  // forgotten, or the next launch would report it
    return "GPU " + std::to_string(device) + ": " + cudaGetErrorString(error);
  }
  const std::string reason = why_not_capability(major, minor, FASTCONV_CUDA_ARCHITECTURES);
  return reason.empty() ? "" : "GPU " + std::to_string(device) + " is " + reason;
}

}  // namespace

std::string why_not_on_gpu(int device) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return std::string("no GPU: ") + cudaGetErrorString(error);
  }
  if (device != kAnyGpu) return device < count ? why_not_on(device) : "there is no GPU " + std::to_string(device);
  std::string reason = "no GPU";
  for (int i = 0; i < count && !reason.empty(); ++i) reason = why_not_on(i);
  return reason;
}

}  // namespace fastconv

// GPUs as data. Defined by cuda/gpu.cpp, in builds with CUDA kernels.
#pragma once

#include <string>

namespace fastconv {

// "" when this build's CUDA kernels run on the device with this number, or on any where it is kAnyGpu; otherwise why not. Starts
// the driver where there is one.
#ifdef FASTCONV_CUDA
std::string why_not_on_gpu(int device);
#else
inline std::string why_not_on_gpu(int) { return "this build has no CUDA kernel"; }
#endif

}  // namespace fastconv

// GPUs as data. Defined by cuda/gpu.cpp, in builds with CUDA kernels only: without them there is no row that asks.
#pragma once

#include <string>

namespace fastconv {

// "" when this build's CUDA kernels run on the device with this number, or on any where it is kAnyGpu; otherwise why not. Starts
// the driver where there is one.
std::string why_not_on_gpu(int device);

}  // namespace fastconv

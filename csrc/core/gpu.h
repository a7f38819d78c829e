// GPUs as data. Defined by cuda/gpu.cpp, in builds with CUDA kernels.
#pragma once

#include <sstream>
#include <string>

namespace fastconv {

// "" when kernels that were `built` for these capabilities ("80 90", the least of which is there as PTX too) run on a GPU of
// capability major.minor; otherwise why not. PTX becomes machine code for whatever is later, and machine code runs on the same
// major with as large a minor, so it is enough to look at the least.
inline std::string why_not_capability(int major, int minor, const std::string& built) {
  std::istringstream words(built);
  int least = 0;
  for (int each; words >> each;) least = least == 0 || each < least ? each : least;
  const int found = 10 * major + minor;
  if (least != 0 && found >= least) return "";
  return "sm_" + std::to_string(found) + ", and this build's CUDA kernels are for " + built +
         " and later (FASTCONV_CUDA_ARCHITECTURES)";
}

// "" when this build's CUDA kernels run on the device with this number, or on any where it is kAnyGpu; otherwise why not. Starts
// the driver where there is one.
#ifdef FASTCONV_CUDA
std::string why_not_on_gpu(int device);
#else
inline std::string why_not_on_gpu(int) { return "this build has no CUDA kernel"; }
#endif

}  // namespace fastconv

// Scratch memory that a thread keeps between calls, so that a call does not allocate it.
#pragma once

#include <cstdint>

namespace fastconv {

// What a thread keeps; a larger block is allocated for its one call. Kernels ask for L2-sized blocks a thread.
constexpr int64_t kKeptScratchBytes = int64_t{16} << 20;

// At least `bytes` uninitialised bytes on a cache line of their own, for this thread alone: good until the thread's next Scratch.
// Throws std::bad_alloc.
class Scratch {
 public:
  explicit Scratch(int64_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  void* data() const { return data_; }

 private:
  void* data_;
  bool owned_;  // beyond what is kept
};

}  // namespace fastconv

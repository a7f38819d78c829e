#include "core/freed_memory.h"

#include <cstdlib>

namespace fastconv {

void keep_freed_memory() {
  // As large as glibc lets a freed block count (DEFAULT_MMAP_THRESHOLD_MAX), with a page for its header and one for the flags in
  // it.
  constexpr std::size_t kMost = (std::size_t{4} << 20) * sizeof(long) - 2 * 4096;
  // Behind a volatile pointer, for a compiler may leave out an allocation that nobody uses.
  void* volatile block = std::malloc(kMost);
  std::free(block);
}

}  // namespace fastconv

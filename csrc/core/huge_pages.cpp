#include "core/huge_pages.h"

#include <cstdlib>
#include <cstring>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace fastconv {

#if defined(__linux__) && defined(MADV_HUGEPAGE)
void prefer_huge_pages(void* data, int64_t bytes) {
  static const bool allowed = [] {
    const char* value = std::getenv("FASTCONV_HUGE_PAGES");
    return !value || std::strcmp(value, "0") != 0;
  }();
  if (!allowed || !data || bytes < kHugePagesFrom) return;
  static const auto page = uintptr_t(sysconf(_SC_PAGESIZE));
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + page - 1) & ~(page - 1);
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) & ~(page - 1);
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
}
#else
void prefer_huge_pages(void*, int64_t) {}
#endif

}  // namespace fastconv

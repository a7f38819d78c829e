// Results on huge pages.
#pragma once

#include <cstdint>

namespace fastconv {

// From so many bytes on, as in NumPy. Fresh memory of 25 MB takes 13 ms to be written for the first time in pages of 4 KB, which
// the kernel clears one fault after the other, and 0.2 ms in pages of 2 MB; memory that has been written before takes neither.
constexpr int64_t kHugePagesFrom = int64_t(4) << 20;

// Asks the system for huge pages in the whole pages of a result that is about to be written. A hint: memory that has pages keeps
// them, and where the system has none to give nothing changes. FASTCONV_HUGE_PAGES=0 forbids it.
void prefer_huge_pages(void* data, int64_t bytes);

}  // namespace fastconv

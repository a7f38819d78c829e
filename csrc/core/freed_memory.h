// What malloc does with results that are freed.
#pragma once

namespace fastconv {

// glibc maps blocks from 128 KB on by themselves and hands the end of its heap back to the system, so that the results of a
// network are taken from the system call after call and every page is touched for the first time: 1.1 to 1.2 times a fused
// ResNet-50's or DenseNet's time at batch 1, in 2100 and 1500 page faults. Both limits grow when a mapped block is freed
// ("dynamic mmap threshold", mallopt(3)), to 32 and 64 MB at most; this frees such a block once. Programs that work on larger
// batches have done so anyway. Limits that the user has set (MALLOC_TRIM_THRESHOLD_, mallopt) stay, and other allocators take no
// notice.
void keep_freed_memory();

}  // namespace fastconv

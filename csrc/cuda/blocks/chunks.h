// Chunks of 16 bytes, kWide<T> elements, the unit in which tensor core kernels bring their operands to shared memory.
#pragma once

#include "cuda/blocks/copy.h"
#include "cuda/blocks/element.h"

namespace fastconv::sm80 {

// Brings `count` elements, `step` apart in memory, and zeros after them; zeros alone where the chunk does not `exist`. Copied
// asynchronously where kAsync says that it is 16 aligned bytes or none, else gathered element by element. `anywhere` is an
// address that may be given to a copy which reads nothing.
template <bool kAsync, class T>
FC_DEVICE void bring_chunk(T* to, const T* from, int64_t step, int64_t count, bool exists, const T* anywhere) {
  if constexpr (kAsync) {
    copy_async(to, exists && count > 0 ? from : anywhere, exists && count > 0);
  } else {
    Pack<T, kWide<T>> chunk;
    FC_UNROLL
    for (int i = 0; i < kWide<T>; ++i) chunk.v[i] = exists && i < count ? from[i * step] : from_float<T>(0);
    store_pack(to, chunk);
  }
}

}  // namespace fastconv::sm80

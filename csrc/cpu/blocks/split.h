// Cutting work into even pieces, and memory into aligned ones.
#pragma once

#include "cpu/simd/vec.h"

namespace fastconv::FASTCONV_TARGET {

// `count` things cut into the fewest parts of at most `most`, whose sizes differ by at most one: 49 pixels in tiles of at most 6
// are 4 of 6 and 5 of 5, not 8 of 6 and one of 1. The divisions are here, once: five of them for every tile took as long as forty
// steps of it.
struct EvenSplit {
  int64_t count, parts, least, larger;  // parts 0 .. larger-1 have least + 1
  FC_INLINE EvenSplit(int64_t count_, int64_t most)
      : count(count_), parts((count_ + most - 1) / most), least(parts ? count_ / parts : 0), larger(parts ? count_ % parts : 0) {}
  FC_INLINE int64_t begin(int64_t part) const { return part * least + (part < larger ? part : larger); }
  FC_INLINE int64_t size(int64_t part) const { return least + (part < larger); }
  FC_INLINE int64_t largest() const { return least + (larger > 0); }
};

FC_INLINE int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Hands out 64-byte aligned pieces of a workspace. With base 0 it only counts, which is how workspace() and run() agree.
class Arena {
 public:
  FC_INLINE explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  FC_INLINE T* take(int64_t count) {
    char* piece = base_ ? base_ + used_ : nullptr;
    used_ += round_up(count * int64_t(sizeof(T)), 64);
    return reinterpret_cast<T*>(piece);
  }
  FC_INLINE int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

}  // namespace fastconv::FASTCONV_TARGET

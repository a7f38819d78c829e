#include "eager/scratch.h"

#include <cstddef>
#include <new>

namespace fastconv {
namespace {

constexpr std::align_val_t kAlignment{64};

struct Kept {
  void* data = nullptr;
  int64_t bytes = 0;
  ~Kept() { ::operator delete(data, kAlignment); }
};

thread_local Kept kept;

}  // namespace

Scratch::Scratch(int64_t bytes) : data_(nullptr), owned_(bytes > kKeptScratchBytes) {
  if (owned_) {
    data_ = ::operator new(std::size_t(bytes), kAlignment);
    return;
  }
  if (bytes > kept.bytes) {
    void* larger = ::operator new(std::size_t(bytes), kAlignment);
    ::operator delete(kept.data, kAlignment);
    kept.data = larger;
    kept.bytes = bytes;
  }
  data_ = kept.data;
}

Scratch::~Scratch() {
  if (owned_) ::operator delete(data_, kAlignment);
}

}  // namespace fastconv

// The CUDA execution model on one CPU thread: what a kernel sees of it.
//
// A block's threads are fibers. A fiber runs until it reaches a barrier or an instruction that the lanes of a warp execute
// together; who runs next is drawn by lot, so a kernel that forgot a barrier meets memory that nobody has written yet, and so is
// which warps stand still for a while, so that others overtake them. Shared memory starts as 0xFF bytes, which are NaN in every
// floating-point format.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "races.h"

namespace emulator {

constexpr int kWarp = 32;
// Bytes that a lane may show to its warp: the operands of one mma.sync.
constexpr int kShown = 48;

struct Site {
  const char* file;
  int line;
};

// What one lane does at a collective instruction, kept twice: a lane may be one instruction ahead of those that still read.
struct Lane {
  unsigned char shown[2][kShown];
  Site site;
};

struct Index {
  unsigned x;
};

// A copy that cp.async has started and nobody has waited for.
struct AsyncCopy {
  void* to;
  const void* from;
  bool exists, landed;
};

struct Thread {
  Index thread, block, block_size, grid_size;
  Lane* warp;  // the 32 lanes of its warp
  int turn;    // which of Lane::shown this lane writes next
  void* shared_memory;
  unsigned step;                               // how many __syncwarp() it has passed
  std::vector<std::vector<AsyncCopy>> copies;  // by group; the last one is still open
};

// The thread whose code runs now.
Thread& self();

// Waits for all threads of the block, which must come to the same place.
void wait_for_block(Site site);
// Waits for all lanes of the warp, which must come to the same place. What they did before may be seen by others of them only
// after the second one.
void wait_for_warp(Site site);
void sync_warp(Site site);

// An error of the kernel: ends the launch with this text.
[[noreturn]] inline void fail(const std::string& text) { throw std::runtime_error(text); }
// The same from where nothing may be thrown: the launch ends when the running thread waits or ends.
void note_error(const std::string& text);

// Every lane's value, by lane.
template <class T>
struct Warp {
  T lane[kWarp];
};

template <class T>
FC_UNSEEN Warp<T> exchange(const T& mine, Site site) {
  static_assert(sizeof(T) <= kShown && std::is_trivially_copyable_v<T>);
  Thread& me = self();
  const int turn = me.turn;
  me.turn = 1 - turn;
  std::memcpy(me.warp[me.thread.x % kWarp].shown[turn], &mine, sizeof(T));
  wait_for_warp(site);
  Warp<T> all;
  for (int i = 0; i < kWarp; ++i) std::memcpy(&all.lane[i], me.warp[i].shown[turn], sizeof(T));
  return all;
}

// Runs body() as every thread of every block. Throws std::runtime_error for what would hang or be undefined on a GPU.
void run_grid(unsigned blocks, unsigned threads, size_t shared_bytes, const std::function<void()>& body);

// Which lots are drawn from now on.
void set_seed(uint64_t seed);

// cp.async of 16 bytes, or of 16 zero bytes where they do not exist: lands at once, over what another thread still reads, or as
// late as when it is waited for, drawn by lot.
void start_copy(void* to, const void* from, bool exists);
// Closes a group of copies.
void close_copies();
// Waits for all closed groups but the last `pending`: a thread that does not may read what was there before.
void finish_copies(int pending);

// Asynchronous copies started since the last call of set_seed: those that move something tell which way a kernel took.
uint64_t copies_started();

}  // namespace emulator

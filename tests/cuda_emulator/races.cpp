// The hooks that -fsanitize=thread calls, and what they remember of memory. See races.h.
#include "races.h"

#ifdef FASTCONV_RACES

#include <dlfcn.h>

#include <algorithm>
#include <bitset>
#include <cstdio>
#include <unordered_map>
#include <vector>

#include "emulator.h"

namespace emulator::races {
namespace {

// Halves are the smallest numbers that threads write to memory; a flag has one byte of a cell.
constexpr size_t kCell = 2;
constexpr uint32_t kNever = 0;

// One access: in which interval between barriers, by which thread, after how many __syncwarp() of its warp. Intervals are
// numbered through all blocks of a launch.
struct Access {
  uint32_t interval = kNever;
  int32_t where = 0;  // from kHere
  uint16_t thread = 0, step = 0;
  uint8_t bytes = 3;    // of the cell, a bit for each
  bool flying = false;  // an asynchronous copy that nobody has waited for
};

// Of readers two are enough: whatever a third one would be unordered with is unordered with one of them.
struct Cell {
  Access write, reads[2];
};

uintptr_t shared_begin = 0, stacks_begin = 0;
size_t shared_size = 0, stacks_size = 0;
bool tracking = false;
uint32_t interval = kNever, first_interval = kNever;
// The first interval of each block that has begun, and its number.
std::vector<std::pair<uint32_t, unsigned>> blocks;
std::vector<Cell> shared_cells;
std::unordered_map<uintptr_t, Access> global_writes;
// Pages, by the last bits of their number, that somebody wrote: most of what is read is on none.
std::bitset<1 << 16> written_pages;

size_t page_of(uintptr_t address) { return address >> 12 & 0xFFFF; }

// Addresses of code are kept as distances from this one.
uintptr_t here() { return reinterpret_cast<uintptr_t>(&pass_barrier); }

Access mine(const void* where) {
  const Thread& me = self();
  return {interval, int32_t(uintptr_t(where) - here()), uint16_t(me.thread.x), uint16_t(me.step)};
}

// Whether `a`, which ran before `b`, comes before it in every schedule.
bool ordered(const Access& a, const Access& b) {
  if (a.interval == kNever || !(a.bytes & b.bytes)) return true;
  if (a.flying || a.interval < first_interval) return false;
  return a.interval != b.interval || a.thread == b.thread || (a.thread / kWarp == b.thread / kWarp && a.step != b.step);
}

// An address in the library's file, which fastconv.testing.emulator turns into a line.
std::string place(const Access& access) {
  const uintptr_t where = here() + uintptr_t(intptr_t(access.where));
  Dl_info info;
  if (!dladdr(reinterpret_cast<void*>(where), &info)) return "?";
  // The call is before the address that it returns to.
  char text[32];
  std::snprintf(text, sizeof text, "@0x%zx", size_t(where - 1 - reinterpret_cast<uintptr_t>(info.dli_fbase)));
  return text;
}

[[gnu::cold]] void report(const Access& before, const char* did, const Access& now, const char* does, bool shared, uintptr_t at) {
  char address[64];
  std::snprintf(address, sizeof address, shared ? "byte %zu of shared memory" : "0x%zx in global memory",
                size_t(shared ? at - shared_begin : at));
  const auto who = [](const Access& a) {
    const auto next = std::find_if(blocks.begin(), blocks.end(), [&](const auto& block) { return block.first > a.interval; });
    return "thread " + std::to_string(a.thread) + " of block " + std::to_string(std::prev(next)->second);
  };
  note_error("a race at " + std::string(address) + ": " + who(before) + " " + (before.flying ? "copies to it" : did) + " at " +
             place(before) + ", " + who(now) + " " + (now.flying ? "copies to it" : does) + " at " + place(now) +
             (before.flying ? ", and has not waited for the copy" : ", with no barrier between them"));
}

void remember_read(Cell& cell, const Access& now) {
  for (Access& slot : cell.reads) {
    if (slot.interval != now.interval || slot.thread == now.thread || (slot.bytes == now.bytes && ordered(slot, now))) {
      slot = now;
      return;
    }
  }
  // Two of one warp say less than one of each of two.
  if (cell.reads[0].thread / kWarp == cell.reads[1].thread / kWarp) cell.reads[1] = now;
}

void read_shared(uintptr_t begin, size_t count, Access now) {
  if (count == 1) now.bytes = uint8_t(1 << begin % kCell);
  for (uintptr_t at = begin; at < begin + count; at += kCell) {
    Cell& cell = shared_cells[(at - shared_begin) / kCell];
    if (!ordered(cell.write, now)) return report(cell.write, "wrote", now, "reads", true, at);
    remember_read(cell, now);
  }
}

void write_shared(uintptr_t begin, size_t count, Access now) {
  if (count == 1) now.bytes = uint8_t(1 << begin % kCell);
  for (uintptr_t at = begin; at < begin + count; at += kCell) {
    Cell& cell = shared_cells[(at - shared_begin) / kCell];
    if (!ordered(cell.write, now)) return report(cell.write, "wrote", now, "writes", true, at);
    for (const Access& read : cell.reads) {
      if (!ordered(read, now)) return report(read, "read", now, "writes", true, at);
    }
    cell.write = now;
  }
}

void read_global(uintptr_t begin, size_t count, Access now) {
  if (count == 1) now.bytes = uint8_t(1 << begin % kCell);
  if (!written_pages[page_of(begin)] && !written_pages[page_of(begin + count - 1)]) return;
  for (uintptr_t at = begin / kCell * kCell; at < begin + count; at += kCell) {
    const auto found = global_writes.find(at);
    if (found != global_writes.end() && !ordered(found->second, now)) {
      return report(found->second, "wrote", now, "reads", false, at);
    }
  }
}

void write_global(uintptr_t begin, size_t count, Access now) {
  if (count == 1) now.bytes = uint8_t(1 << begin % kCell);
  written_pages[page_of(begin)] = written_pages[page_of(begin + count - 1)] = true;
  for (uintptr_t at = begin / kCell * kCell; at < begin + count; at += kCell) {
    Access& before = global_writes[at];
    if (!ordered(before, now)) return report(before, "wrote", now, "writes", false, at);
    before = now;
  }
}

enum class Kind { shared, global, own };

Kind kind_of(uintptr_t address) {
  if (address - shared_begin < shared_size) return Kind::shared;
  return address - stacks_begin < stacks_size ? Kind::own : Kind::global;
}

}  // namespace

Launch::Launch(const void* stacks, size_t stack_bytes) {
  stacks_begin = uintptr_t(stacks);
  stacks_size = stack_bytes;
  global_writes.clear();
  written_pages.reset();
  blocks.clear();
  interval = kNever;
  shared_size = 0;
  tracking = true;
}

Launch::~Launch() { tracking = false; }

void begin_block(unsigned block, const void* shared, size_t shared_bytes) {
  shared_begin = uintptr_t(shared);
  shared_size = shared_bytes;
  shared_cells.assign((shared_bytes + kCell - 1) / kCell, {});
  blocks.emplace_back(++interval, block);
  first_interval = interval;
}

void pass_barrier() { ++interval; }

void read(const void* bytes, size_t count, const void* where) {
  if (!tracking) return;
  const uintptr_t begin = uintptr_t(bytes);
  switch (kind_of(begin)) {
    case Kind::shared:
      return read_shared(begin, count, mine(where));
    case Kind::global:
      return read_global(begin, count, mine(where));
    case Kind::own:
      return;
  }
}

static void write(const void* bytes, size_t count, const void* where) {
  if (!tracking) return;
  const uintptr_t begin = uintptr_t(bytes);
  switch (kind_of(begin)) {
    case Kind::shared:
      return write_shared(begin, count, mine(where));
    case Kind::global:
      return write_global(begin, count, mine(where));
    case Kind::own:
      return;
  }
}

void start_copy(const void* to, size_t count, const void* where) {
  Access now = mine(where);
  now.flying = true;
  write_shared(uintptr_t(to), count, now);
}

void finish_copy(const void* to, size_t count, const void* where) {
  const Access now = mine(where);
  for (uintptr_t at = uintptr_t(to); at < uintptr_t(to) + count; at += kCell) {
    shared_cells[(at - shared_begin) / kCell].write = now;
  }
}

}  // namespace emulator::races

// Hidden: they are this library's own.
#define FC_HOOK(name, call) \
  extern "C" __attribute__((visibility("hidden"))) void name { emulator::races::call; }
#define FC_WHERE __builtin_return_address(0)
#define FC_SIZE(n)                                                 \
  FC_HOOK(__tsan_read##n(void* p), read(p, n, FC_WHERE))           \
  FC_HOOK(__tsan_write##n(void* p), write(p, n, FC_WHERE))         \
  FC_HOOK(__tsan_unaligned_read##n(void* p), read(p, n, FC_WHERE)) \
  FC_HOOK(__tsan_unaligned_write##n(void* p), write(p, n, FC_WHERE))
FC_SIZE(1)
FC_SIZE(2)
FC_SIZE(4)
FC_SIZE(8)
FC_SIZE(16)
FC_HOOK(__tsan_read_range(void* p, size_t n), read(p, n, FC_WHERE))
FC_HOOK(__tsan_write_range(void* p, size_t n), write(p, n, FC_WHERE))

// Called besides, and of no use here.
#define FC_IGNORED(name) \
  extern "C" __attribute__((visibility("hidden"))) void name {}
FC_IGNORED(__tsan_init())
FC_IGNORED(__tsan_func_entry(void*))
FC_IGNORED(__tsan_func_exit())
FC_IGNORED(__tsan_vptr_update(void**, void*))
FC_IGNORED(__tsan_vptr_read(void**))

#endif

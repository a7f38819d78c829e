// Fibers and the scheduler that runs a block of them.
#include "emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__x86_64__)
// Pushes what a call must preserve, exchanges the stack pointers and pops: 10 ns, where swapcontext makes two system calls.
extern "C" void fastconv_emulator_switch(void** save, void* const* load);
asm(R"(
.text
.globl fastconv_emulator_switch
.type fastconv_emulator_switch, @function
fastconv_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq (%rsi), %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastconv_emulator_switch, .-fastconv_emulator_switch
)");
#endif

namespace emulator {
namespace {

// ASan's red zones make frames several times larger.
constexpr size_t kStack = 256 << 10;
// As long as a warp takes to multiply a slice and more: 44 collective instructions in conv2d_fwd.implicit_gemm.
constexpr unsigned kRoundsAsleep = 64;

// --- switching stacks

#if defined(__x86_64__)

struct Stack {
  void* pointer = nullptr;
  void start(unsigned char* memory, void (*entry)()) {
    void** top = reinterpret_cast<void**>(memory + kStack);
    // As if `entry` had just been called: 8 bytes off a multiple of 16, with six registers below the return address.
    top[-2] = reinterpret_cast<void*>(entry);
    for (int i = 3; i <= 8; ++i) top[-i] = nullptr;
    pointer = top - 8;
  }
  static void change(Stack& from, Stack& to) { fastconv_emulator_switch(&from.pointer, &to.pointer); }
};

#else

struct Stack {
  ucontext_t context;
  void start(unsigned char* memory, void (*entry)()) {
    getcontext(&context);
    context.uc_stack = {.ss_sp = memory, .ss_flags = 0, .ss_size = kStack};
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  static void change(Stack& from, Stack& to) { swapcontext(&from.context, &to.context); }
};

#endif

// --- fibers

enum class State { ready, at_barrier, at_collective, done };

struct Fiber {
  Thread thread;
  Stack stack;
  State state;
  Site site;
};

std::vector<Fiber> fibers;
unsigned char* stacks = nullptr;  // one mapping, kStack bytes for each fiber
Stack scheduler;
Fiber* running = nullptr;
const std::function<void()>* body = nullptr;
std::string error;
std::mt19937_64 lots;
uint64_t copies = 0;

#if defined(__SANITIZE_ADDRESS__)
const void* scheduler_stack = nullptr;
size_t scheduler_stack_size = 0;
#endif

unsigned char* stack_of(const Fiber& fiber) { return stacks + size_t(&fiber - fibers.data()) * kStack; }

void to_scheduler([[maybe_unused]] bool forever) {
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(forever ? nullptr : &fake, scheduler_stack, scheduler_stack_size);
#endif
  Stack::change(running->stack, scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void to_fiber(Fiber& fiber) {
  running = &fiber;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, stack_of(fiber), kStack);
#endif
  Stack::change(scheduler, fiber.stack);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
  try {
    (*body)();
    for (const auto& group : running->thread.copies) {
      if (!group.empty()) fail("a thread ended with an asynchronous copy that nobody waited for");
    }
  } catch (const std::exception& e) {
    if (error.empty()) error = e.what();
  }
  running->state = State::done;
  to_scheduler(true);
}

void wait(State state, Site site) {
  running->state = state;
  running->site = site;
  to_scheduler(false);
}

// --- asynchronous copies

// Over what another thread still reads, perhaps.
void land(const AsyncCopy& copy) {
  if (copy.exists) {
    std::memcpy(copy.to, copy.from, 16);
  } else {
    std::memset(copy.to, 0, 16);
  }
}

// --- one block

std::string describe(const Fiber& fiber) {
  std::string text = "thread " + std::to_string(fiber.thread.thread.x);
  if (fiber.state == State::done) return text + " has ended";
  text += fiber.state == State::at_barrier ? " waits for its block at " : " waits for its warp at ";
  return text + fiber.site.file + ":" + std::to_string(fiber.site.line);
}

// Lets the fibers begin .. end go on if all of them stand at one place. True if they did.
bool release(size_t begin, size_t end, State state) {
  const Fiber& first = fibers[begin];
  for (size_t i = begin; i < end; ++i) {
    const Fiber& fiber = fibers[i];
    if (fiber.state != state || fiber.site.line != first.site.line || std::strcmp(fiber.site.file, first.site.file) != 0) {
      return false;
    }
  }
  for (size_t i = begin; i < end; ++i) fibers[i].state = State::ready;
  return true;
}

[[noreturn]] void report_deadlock(unsigned threads) {
  const Fiber& first = fibers[0];
  for (unsigned i = 1; i < threads; ++i) {
    const Fiber& fiber = fibers[i];
    if (fiber.state != first.state || (fiber.state != State::done && fiber.site.line != first.site.line)) {
      fail("deadlock: " + describe(first) + ", " + describe(fiber));
    }
  }
  fail("deadlock: " + describe(first) + ", like all others");
}

// The threads that run in the next rounds: those of every warp, or of a drawn half of them.
void choose_order(std::vector<unsigned>& order, unsigned threads) {
  const uint64_t asleep = lots() % 2 ? lots() : 0;
  order.clear();
  for (unsigned i = 0; i < threads; ++i) {
    if (!(asleep >> (i / kWarp % 64) & 1)) order.push_back(i);
  }
}

void run_block(unsigned block, unsigned blocks, unsigned threads, void* shared, size_t shared_bytes, std::vector<Lane>& lanes) {
  races::begin_block(block, shared, shared_bytes);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.thread = {{i}, {block}, {threads}, {blocks}, &lanes[i / kWarp * kWarp], 0, shared, 0, {{}}};
    fiber.state = State::ready;
    fiber.stack.start(stack_of(fiber), fiber_main);
  }
  std::vector<unsigned> order;
  for (unsigned round = 0;; ++round) {
    // For some rounds only some of the warps run, unless nobody else can: warps are in step on no GPU.
    if (round % kRoundsAsleep == 0) choose_order(order, threads);
    std::shuffle(order.begin(), order.end(), lots);
    bool moved = false, alive = false;
    for (const unsigned i : order) {
      if (fibers[i].state != State::ready) continue;
      to_fiber(fibers[i]);
      moved = true;
      if (!error.empty()) fail(error);
    }
    for (unsigned i = 0; i < threads; ++i) alive |= fibers[i].state != State::done;
    if (!alive) return;
    for (unsigned warp = 0; warp < threads; warp += kWarp) {
      if (fibers[warp].state == State::at_collective) moved |= release(warp, warp + kWarp, State::at_collective);
    }
    if (fibers[0].state == State::at_barrier && release(0, threads, State::at_barrier)) {
      races::pass_barrier();
      moved = true;
    }
    if (moved) continue;
    if (order.size() == threads) report_deadlock(threads);
    order.resize(threads);
    std::iota(order.begin(), order.end(), 0u);
  }
}

}  // namespace

Thread& self() { return running->thread; }

void wait_for_block(Site site) { wait(State::at_barrier, site); }

void wait_for_warp(Site site) { wait(State::at_collective, site); }

void sync_warp(Site site) {
  wait_for_warp(site);
  ++self().step;
}

void note_error(const std::string& text) {
  if (error.empty()) error = text;
}

void set_seed(uint64_t seed) {
  lots.seed(seed);
  copies = 0;
}

void start_copy(void* to, const void* from, bool exists) {
  if (uintptr_t(to) % 16 != 0 || (exists && uintptr_t(from) % 16 != 0)) fail("cp.async: an address not aligned to 16 bytes");
  races::start_copy(to, 16, __builtin_return_address(0));
  if (exists) races::read(from, 16, __builtin_return_address(0));
  ++copies;
  AsyncCopy copy = {to, from, exists, lots() % 2 != 0};
  if (copy.landed) land(copy);
  self().copies.back().push_back(copy);
}

void close_copies() { self().copies.emplace_back(); }

void finish_copies(int pending) {
  auto& groups = self().copies;
  while (int(groups.size()) - 1 > pending) {
    for (const AsyncCopy& copy : groups.front()) {
      if (!copy.landed) land(copy);
      races::finish_copy(copy.to, 16, __builtin_return_address(0));
    }
    groups.erase(groups.begin());
  }
}

uint64_t copies_started() { return copies; }

void run_grid(unsigned blocks, unsigned threads, size_t shared_bytes, const std::function<void()>& kernel) {
  if (threads % kWarp != 0) fail("a block of " + std::to_string(threads) + " threads, which is no multiple of 32");
  if (fibers.size() < threads) {
    if (stacks) munmap(stacks, fibers.size() * kStack);
    void* memory = mmap(nullptr, threads * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) fail("no memory for stacks");
    stacks = static_cast<unsigned char*>(memory);
    fibers.resize(threads);
  }
  body = &kernel;
  error.clear();
  const races::Launch launch(stacks, fibers.size() * kStack);
  std::vector<Lane> lanes(threads);
  std::vector<unsigned> order(blocks);
  for (unsigned i = 0; i < blocks; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), lots);
  // Exactly as large as was asked for, so that AddressSanitizer sees what lies behind it.
  void* shared = nullptr;
  if (shared_bytes && posix_memalign(&shared, 128, shared_bytes) != 0) fail("no memory for shared memory");
  const std::unique_ptr<void, decltype(&std::free)> owner(shared, &std::free);
  for (const unsigned block : order) {
    if (shared_bytes) std::memset(shared, 0xFF, shared_bytes);
    run_block(block, blocks, threads, shared, shared_bytes, lanes);
  }
}

}  // namespace emulator

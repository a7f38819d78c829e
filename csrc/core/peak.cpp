#include "core/peak.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <string>

#include "core/machine_info.h"
#include "core/parallel.h"

namespace fastconv {

// One step of the measurement, compiled for each ISA: cpu/blocks/fma_burst.cpp. All return the operations done.
#define FC_DECLARE_BURST            \
  double fma_burst_f32(int rounds); \
  double fma_burst_f64(int rounds);
namespace scalar {
FC_DECLARE_BURST
}
#ifdef FASTCONV_AVX2
namespace avx2 {
FC_DECLARE_BURST
}
#endif
#ifdef FASTCONV_AVX512
namespace avx512 {
FC_DECLARE_BURST
}
#endif
#ifdef FASTCONV_AVX512_BF16
namespace avx512_bf16 {
double fma_burst_bf16(int rounds);
}
#endif

namespace {

using Burst = double (*)(int rounds);

struct Entry {
  const char* target;
  Isa isa;
  Burst f32, f64, bf16 = nullptr;
};

constexpr Entry kEntries[] = {
    {"scalar", kIsaScalar, scalar::fma_burst_f32, scalar::fma_burst_f64},
#ifdef FASTCONV_AVX2
    {"avx2", kIsaAvx2, avx2::fma_burst_f32, avx2::fma_burst_f64},
#endif
#ifdef FASTCONV_AVX512
    {"avx512", kIsaAvx512, avx512::fma_burst_f32, avx512::fma_burst_f64},
#endif
#ifdef FASTCONV_AVX512_BF16
    {"avx512_bf16", kIsaAvx512Bf16, avx512::fma_burst_f32, avx512::fma_burst_f64, avx512_bf16::fma_burst_bf16},
#endif
};

Burst find(const char* isa, const char* dtype) {
  for (const Entry& entry : kEntries) {
    if (std::strcmp(entry.target, isa) == 0 && (machine_info().isa_found & entry.isa)) {
      if (std::strcmp(dtype, "f32") == 0) return entry.f32;
      if (std::strcmp(dtype, "f64") == 0) return entry.f64;
      if (entry.bf16 && std::strcmp(dtype, "bf16") == 0) return entry.bf16;
    }
  }
  throw std::invalid_argument(std::string("fma_peak: cannot run ") + isa + " " + dtype + " here");
}

}  // namespace

double fma_peak(const char* isa, const char* dtype, int threads, double seconds) {
  using Clock = std::chrono::steady_clock;
  const Burst burst = find(isa, dtype);
  constexpr int kRounds = 200000;  // about half a millisecond: long against a timer, short against a time slice
  double best = 0;
  const auto start = Clock::now();
  do {
    std::atomic<double> operations{0};
    struct Work {
      Burst burst;
      std::atomic<double>* operations;
    } work{burst, &operations};
    const auto begin = Clock::now();
    parallel_ranges(
        threads, threads,
        [](void* arg, int, int64_t first, int64_t last) {
          auto& w = *static_cast<Work*>(arg);
          for (int64_t i = first; i < last; ++i) {
            const double done = w.burst(kRounds);
            double seen = w.operations->load();
            while (!w.operations->compare_exchange_weak(seen, seen + done)) {
            }
          }
        },
        &work);
    const double elapsed = std::chrono::duration<double>(Clock::now() - begin).count();
    best = std::max(best, operations.load() / elapsed * 1e-9);
  } while (std::chrono::duration<double>(Clock::now() - start).count() < seconds);
  return best;
}

}  // namespace fastconv

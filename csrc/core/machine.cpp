#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <thread>

#include "core/machine_info.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fastconv {
namespace {

// The psABI levels, not single features: x86-64-v3 is Haswell and Zen, x86-64-v4 is Skylake-X and Zen 4. The builtin also asks
// the operating system (xgetbv) whether it saves the registers.
uint32_t detect_isa() {
  uint32_t bits = kIsaScalar;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) {
    bits |= kIsaAvx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd")) {
      bits |= kIsaAvx512;
#ifdef FASTCONV_AVX512_BF16
      // In no psABI level: Cooper Lake, Sapphire Rapids, Zen 4.
      if (__builtin_cpu_supports("avx512bf16")) bits |= kIsaAvx512Bf16;
#endif
    }
  }
#endif
  return bits;
}

uint32_t isa_mask(const std::string& name) {
  if (name.empty() || name == "avx512_bf16") return kIsaScalar | kIsaAvx2 | kIsaAvx512 | kIsaAvx512Bf16;
  if (name == "avx512") return kIsaScalar | kIsaAvx2 | kIsaAvx512;
  if (name == "avx2") return kIsaScalar | kIsaAvx2;
  if (name == "scalar") return kIsaScalar;
  throw std::invalid_argument("FASTCONV_ISA: got '" + name + "', expected scalar, avx2, avx512 or avx512_bf16");
}

std::string cpu_brand() {
#if defined(__x86_64__)
  unsigned regs[12];
  if (unsigned(__get_cpuid_max(0x80000000u, nullptr)) >= 0x80000004u) {
    for (unsigned i = 0; i < 3; ++i) {
      __get_cpuid(0x80000002u + i, &regs[4 * i], &regs[4 * i + 1], &regs[4 * i + 2], &regs[4 * i + 3]);
    }
    char brand[49] = {};
    std::memcpy(brand, regs, 48);
    return brand + std::strspn(brand, " ");
  }
#endif
  return "unknown";
}

int64_t cache_bytes(int name, int64_t otherwise) {
  long bytes = sysconf(name);  // -1 or 0 where the kernel or the libc does not know (containers, musl)
  return bytes > 0 ? bytes : otherwise;
}

MachineInfo detect() {
  MachineInfo info{};
  info.isa_found = detect_isa();
  info.cores = int32_t(std::thread::hardware_concurrency());
  info.cpu = cpu_brand();
  info.machine.threads = 1;
  info.machine.l1_bytes = cache_bytes(_SC_LEVEL1_DCACHE_SIZE, 32 << 10);
  info.machine.l2_bytes = cache_bytes(_SC_LEVEL2_CACHE_SIZE, 512 << 10);
  info.machine.l3_bytes = cache_bytes(_SC_LEVEL3_CACHE_SIZE, 0);
  const char* limit = std::getenv("FASTCONV_ISA");
  info.machine.isa = info.isa_found & isa_mask(limit ? limit : "");
  return info;
}

MachineInfo& mutable_info() {
  static MachineInfo info = detect();
  return info;
}

}  // namespace

const MachineInfo& machine_info() { return mutable_info(); }

void set_isa_limit(const std::string& name) { mutable_info().machine.isa = mutable_info().isa_found & isa_mask(name); }

const char* isa_name(Isa isa) {
  if (isa == kIsaAvx512Bf16) return "avx512_bf16";
  return isa == kIsaAvx512 ? "avx512" : isa == kIsaAvx2 ? "avx2" : "scalar";
}

std::vector<std::string> isa_names(uint32_t bits) {
  std::vector<std::string> names;
  for (Isa isa : {kIsaScalar, kIsaAvx2, kIsaAvx512, kIsaAvx512Bf16}) {
    if (bits & isa) names.push_back(isa_name(isa));
  }
  return names;
}

}  // namespace fastconv

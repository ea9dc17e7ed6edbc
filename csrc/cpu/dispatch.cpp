// Chooses the instruction set, once.
#include <c10/util/Exception.h>

#include <cstdlib>
#include <string>

#ifdef ADASPLASH_X86
#include <cpuid.h>
#endif

#include "adasplash.h"
#include "cpu/kernels.h"
#include "kernels_library.h"

namespace adasplash {
namespace cpu {

// Of kernels.cpp, as compiled for each set. No template: one of torch's types would be hidden from the other library.
#define ADASPLASH_DECLARE_KERNELS(CAPABILITY)                \
  namespace CAPABILITY {                                     \
  ADASPLASH_BETWEEN_LIBRARIES const KernelSet& kernel_set(); \
  }
ADASPLASH_DECLARE_KERNELS(DEFAULT)
#ifdef ADASPLASH_X86
ADASPLASH_DECLARE_KERNELS(AVX2)
ADASPLASH_DECLARE_KERNELS(AVX512)
#endif

namespace {

enum class InstructionSet { kDefault, kAvx2, kAvx512 };
constexpr const char* kNames[] = {"default", "avx2", "avx512"};

#ifdef ADASPLASH_X86
// Which clang 16 cannot ask __builtin_cpu_supports for.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

InstructionSet best() {
#ifdef ADASPLASH_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma")) {
    return InstructionSet::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) {
    return InstructionSet::kAvx2;
  }
#endif
  return InstructionSet::kDefault;
}

InstructionSet choose() {
  const char* forced = std::getenv("ADASPLASH_CPU_CAPABILITY");
  if (forced == nullptr || *forced == '\0') return best();
  for (int i = 0; i <= static_cast<int>(best()); ++i) {
    if (std::string(forced) == kNames[i]) return static_cast<InstructionSet>(i);
  }
  TORCH_CHECK(false, "ADASPLASH_CPU_CAPABILITY is '", forced, "'; this machine runs default",
              best() >= InstructionSet::kAvx2 ? ", avx2" : "", best() >= InstructionSet::kAvx512 ? ", avx512" : "");
}

InstructionSet chosen() {
  static const InstructionSet set = choose();
  return set;
}

const KernelSet& chosen_kernels() {
#ifdef ADASPLASH_X86
  if (chosen() == InstructionSet::kAvx512) return AVX512::kernel_set();
  if (chosen() == InstructionSet::kAvx2) return AVX2::kernel_set();
#endif
  chosen();
  return DEFAULT::kernel_set();
}

}  // namespace

template <typename T, typename A>
const Kernels<T, A>& kernels() {
  return *std::get<const Kernels<T, A>*>(chosen_kernels());
}

template const Kernels<double, double>& kernels();
template const Kernels<float, float>& kernels();
template const Kernels<c10::BFloat16, float>& kernels();
template const Kernels<c10::Half, float>& kernels();

}  // namespace cpu

std::string cpu_capability() { return cpu::kNames[static_cast<int>(cpu::chosen())]; }

}  // namespace adasplash

const char* adasplash_cpu_capability() {
  try {
    static const std::string capability = adasplash::cpu_capability();
    return capability.c_str();
  } catch (const c10::Error&) {
    return nullptr;
  }
}

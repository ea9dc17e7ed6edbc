#include "cuda/portable/portable.h"

namespace adasplash::cuda::portable {

constexpr Portable kPortable;

std::optional<std::string> Portable::refusal(const CallKind& kind) const {
  if (kind.dtype == at::kDouble) return "float64 runs on the CPU only; the GPU takes float32, float16 and bfloat16";
  return std::nullopt;  // where the card is one that nothing was built for, looking for a kernel says so
}

}  // namespace adasplash::cuda::portable

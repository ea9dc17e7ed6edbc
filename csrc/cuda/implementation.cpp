// Which implementations there are, and which computes a call.
#include "cuda/implementation.h"

#include <c10/util/Exception.h>

#include <atomic>
#include <cstdlib>
#include <string_view>

#include "cuda/portable/portable.h"

namespace adasplash::cuda {
namespace {

constexpr const char* kVariable = "ADASPLASH_CUDA_IMPL";

// All that are built, in order of preference. The last serves whatever the GPU can do at all.
const Implementation* const kImplementations[] = {&portable::kPortable};

std::string built_names() {
  std::string names;
  for (const Implementation* one : kImplementations) names += (names.empty() ? "" : ",") + std::string(one->name());
  return names;
}

// Null if none has this name.
const Implementation* find_implementation(std::string_view name) {
  for (const Implementation* one : kImplementations) {
    if (name == one->name()) return one;
  }
  return nullptr;
}

// What the environment asks for; null if it does not say. Read once, so that a call does not pay for it; a name that is
// not known is an error of every call.
const Implementation* forced_by_environment() {
  static const Implementation* const forced = []() -> const Implementation* {
    const char* const name = std::getenv(kVariable);
    if (!name || !*name) return nullptr;
    const Implementation* const found = find_implementation(name);
    TORCH_CHECK(found, "adasplash: ", kVariable, " asks for an implementation ", name,
                "; this build has: ", built_names());
    return found;
  }();
  return forced;
}

std::atomic<const Implementation*> forced_by_tests{nullptr};

}  // namespace

const Implementation& choose_implementation(const char* op, const CallKind& kind) {
  const Implementation* forced = forced_by_tests.load(std::memory_order_relaxed);
  if (!forced) forced = forced_by_environment();
  if (forced) {
    const std::optional<std::string> reason = forced->refusal(kind);
    TORCH_CHECK(!reason, op, ": the implementation ", forced->name(), ", which ", kVariable,
                " asks for, does not serve this call: ", *reason);
    return *forced;
  }
  std::optional<std::string> reason;
  for (const Implementation* one : kImplementations) {
    reason = one->refusal(kind);
    if (!reason) return *one;
  }
  TORCH_CHECK(false, op, ": ", *reason);  // the last one's, which serves the most
}

const Implementation& implementation_for(const AttentionInputs& inputs) {
  const auto& [op, query, key, value, options, first] = inputs;
  return choose_implementation(
      op, {query.device(), query.scalar_type(), query.sizes().back(), value.sizes().back(), options});
}

}  // namespace adasplash::cuda

// The names of the implementations that are built, in order of preference, separated by commas.
extern "C" __attribute__((visibility("default"))) const char* adasplash_cuda_implementations() {
  static const std::string names = adasplash::cuda::built_names();
  return names.c_str();
}

// For tests: forces an implementation, as ADASPLASH_CUDA_IMPL does, and before it; null takes that back. Returns 1, and
// changes nothing, if none has the name.
extern "C" __attribute__((visibility("default"))) int adasplash_force_cuda_implementation(const char* name) {
  using namespace adasplash::cuda;
  const Implementation* const found = name ? find_implementation(name) : nullptr;
  if (name && !found) return 1;
  forced_by_tests = found;
  return 0;
}

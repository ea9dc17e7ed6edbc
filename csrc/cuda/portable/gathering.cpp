#include "cuda/portable/gathering.h"

#include <algorithm>
#include <atomic>

namespace adasplash::cuda::portable {
namespace {

std::atomic<int32_t> gather_from{8192};
// The matrix products of large heads hide more of what gathering costs.
std::atomic<int32_t> gather_below_small{30}, gather_below_large{50};
constexpr int64_t kSmallHead = 64;

// From the largest length that there may be.
Gathering gathering(const AttentionInputs& inputs, int64_t longest) {
  if (longest < gather_from || inputs.query.numel() == 0) return {};
  const bool small = std::max(inputs.query.sizes().back(), inputs.value.sizes().back()) <= kSmallHead;
  return {gather_from, small ? gather_below_small : gather_below_large};
}

int64_t longest_query(const AttentionInputs& inputs) {
  const int64_t rows = inputs.options.packed() ? 0 : 2;
  return longest_sequence(inputs.options, inputs.options.max_seqlen_q, inputs.query.size(rows)).expect_int();
}

int64_t longest_key(const AttentionInputs& inputs) {
  const int64_t rows = inputs.options.packed() ? 0 : 2;
  return longest_sequence(inputs.options, inputs.options.max_seqlen_k, inputs.key.size(rows)).expect_int();
}

}  // namespace

// Keys in pages are not gathered: there is no code for it.
Gathering Gathering::of_forward(const AttentionInputs& inputs) {
  return inputs.options.paged() ? Gathering{} : gathering(inputs, longest_key(inputs));
}

Gathering Gathering::of_backward(const AttentionInputs& inputs) {
  return gathering(inputs, std::min(longest_query(inputs), longest_key(inputs)));
}

}  // namespace adasplash::cuda::portable

// For tests: sets from which length on it is probed whether to gather, and below which per cent it is done.
extern "C" __attribute__((visibility("default"))) void adasplash_gather(int32_t from, int32_t below) {
  using namespace adasplash::cuda::portable;
  gather_from = from;
  gather_below_small = gather_below_large = below;
}

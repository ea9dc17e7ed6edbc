#include "cuda/portable/gathering.h"

#include <algorithm>
#include <atomic>

#include "cuda/sides.h"

namespace adasplash::cuda::portable {
namespace {

std::atomic<int32_t> gather_from{8192};
// Of the keys that are expected to weigh, and of those that a probe finds to; the matrix products of large heads hide
// more of what gathering costs the backward.
std::atomic<int32_t> forward_below{30}, backward_below_small{30}, backward_below_large{50};
constexpr int64_t kSmallHead = 64;

}  // namespace

Gathering Gathering::of_forward(const AttentionInputs& inputs) {
  if (most_visible(inputs, 1) < gather_from) return {};
  return {gather_from, forward_below};
}

Gathering Gathering::of_backward(const AttentionInputs& inputs) {
  const int64_t shorter = std::min(StoredSide::of_queries(inputs).max_seqlen, StoredSide::of_keys(inputs).max_seqlen);
  if (shorter < gather_from || inputs.query.numel() == 0) return {};
  const bool small = std::max(inputs.query.sizes().back(), inputs.value.sizes().back()) <= kSmallHead;
  return {gather_from, small ? backward_below_small : backward_below_large};
}

}  // namespace adasplash::cuda::portable

// For tests: sets from which length on keys and rows may be gathered, and below which per cent they are.
extern "C" __attribute__((visibility("default"))) void adasplash_gather(int32_t from, int32_t below) {
  using namespace adasplash::cuda::portable;
  gather_from = from;
  forward_below = backward_below_small = backward_below_large = below;
}

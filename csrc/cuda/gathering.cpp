#include "cuda/gathering.h"

#include <algorithm>
#include <atomic>

#include "cuda/launchers.h"
#include "cuda/sides.h"

namespace adasplash::cuda {
namespace {

std::atomic<int32_t> gather_from{8192};  // keys, where a query sees half of them on average, as in causal order
// Of the keys that are expected to weigh, and of those that a probe finds to. The forward looks for them first; the
// backward mostly knows them.
std::atomic<int32_t> forward_below{30}, backward_below{60};
constexpr int64_t kMostKeptKeys = 65536;  // at which marks take 128 bytes a query

// How many keys a sequence must have: half as many where a query sees keys before it and behind it. By the options
// alone, and the same with a window that is too wide to hide a key as without one, since a sequence is computed as if
// it were alone, and callers leave such a window out.
int32_t from_for(const AttentionOptions& options) {
  const int64_t left = options.window[0], right = options.window_right();
  const bool one_sided = left == 0 || right == 0 || (left < 0) != (right < 0);
  return one_sided ? int32_t{gather_from} : std::max(gather_from / 2, 1);
}

}  // namespace

c10::SymInt Gathering::kept_capacity(const at::Tensor& query, const at::Tensor& key, const AttentionOptions& options) {
  const int64_t from = from_for(options);
  if (most_visible(options, from, 1) < from) return 0;  // by the window alone: lengths may be symbols
  const AttentionShape shape = AttentionShape::of(query, key, key, options);
  const c10::SymInt queries = longest_sequence(options, options.max_seqlen_q, shape.queries),
                    keys = longest_sequence(options, options.max_seqlen_k, shape.keys);
  // Of lengths that are symbols nothing is asked, so that no compiled program is for some of them alone.
  const auto known_queries = queries.maybe_as_int(), known_keys = keys.maybe_as_int();
  if (known_queries && known_keys) {
    const bool may_be_shorter = options.packed() || options.kv_seqlens || options.kv_starts;
    if (std::min(*known_queries, *known_keys) < from || (*known_keys > kMostKeptKeys && !may_be_shorter)) return 0;
  }
  return (keys.min(kMostKeptKeys) + (32 * kTile - 1)) / (32 * kTile) + kPlacesBeforeMarks;
}

int32_t Gathering::capacity_of(const at::Tensor& support, const AttentionInputs& inputs) {
  if (!support.defined() || support.numel() == 0) return 0;
  const int64_t kept = kept_capacity(inputs.query, inputs.key, inputs.options).expect_int();
  return support.sizes().back() == kept ? static_cast<int32_t>(kept) : 0;
}

Gathering Gathering::of_forward(const AttentionInputs& inputs) {
  const int32_t from = from_for(inputs.options);
  if (most_visible(inputs, 1) < from) return {};
  return {from, forward_below};
}

Gathering Gathering::of_backward(const AttentionInputs& inputs) {
  const int64_t shorter = std::min(StoredSide::of_queries(inputs).max_seqlen, StoredSide::of_keys(inputs).max_seqlen);
  const int32_t from = from_for(inputs.options);
  if (shorter < from || inputs.query.numel() == 0) return {};
  return {from, backward_below};
}

}  // namespace adasplash::cuda

// For tests: sets from which length on keys and rows may be gathered, and below which per cent they are.
extern "C" __attribute__((visibility("default"))) void adasplash_gather(int32_t from, int32_t below) {
  using namespace adasplash::cuda;
  gather_from = from;
  forward_below = backward_below = below;
}

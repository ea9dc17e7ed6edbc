#include "cuda/part.h"

#include <algorithm>
#include <atomic>

namespace adasplash::cuda {
namespace {

std::atomic<int64_t> scratch_limit{int64_t{1} << 26};  // bytes

// The largest of as few parts of `total` as have at most `most` each, or else one, and differ little.
int64_t evenly(int64_t total, int64_t most) {
  const int64_t allowed = std::clamp<int64_t>(most, 1, total);
  const int64_t parts = (total + allowed - 1) / allowed;
  return (total + parts - 1) / parts;
}

}  // namespace

std::vector<Part> Part::all(const at::Tensor& query, const at::Tensor& key, const AttentionOptions& options,
                            const Scratch& scratch) {
  Part part;
  const bool packed = part.packed_ = options.packed();
  const int64_t batch = packed ? 1 : query.size(0), key_heads = key.size(1);
  const int64_t group = part.group_ = key_heads ? query.size(1) / key_heads : 0;
  const int64_t tile_rows = saved_sizes(query, key, options, 0).tiles.rbegin()[1].expect_int();
  const int64_t keys = longest_sequence(options, options.max_seqlen_k, key.size(packed ? 0 : 2)).expect_int();
  const int64_t pairs = group * tile_rows * count_tiles(keys);
  const int64_t rows = std::max(group * tile_rows, count_tiles(key.size(packed ? 0 : 2)));
  const int64_t of_head = (pairs * scratch.of_pair + rows * scratch.of_tile_row) * int64_t{sizeof(int32_t)};
  const int64_t limit = scratch_limit;
  if (of_head == 0 || of_head * key_heads * batch <= limit) return {part};

  part.whole_ = false;
  part.entries_ = evenly(batch, limit / (of_head * key_heads));
  part.key_heads_ = part.entries_ > 1 ? key_heads : evenly(key_heads, limit / of_head);
  std::vector<Part> parts;
  for (int64_t entry = 0; entry < batch; entry += part.entries_) {
    for (int64_t head = 0; head < key_heads; head += part.key_heads_) {
      Part& next = parts.emplace_back(part);
      next.first_entry_ = entry;
      next.entries_ = std::min(part.entries_, batch - entry);
      next.first_key_head_ = head;
      next.key_heads_ = std::min(part.key_heads_, key_heads - head);
    }
  }
  return parts;
}

at::Tensor Part::narrowed(const at::Tensor& t, int64_t head_dimension, int64_t heads_a_key_head) const {
  if (whole_) return t;
  const at::Tensor entries = packed_ ? t : t.narrow(0, first_entry_, entries_);
  return entries.narrow(head_dimension, first_key_head_ * heads_a_key_head, key_heads_ * heads_a_key_head);
}

AttentionOptions Part::options(const AttentionOptions& whole) const {
  AttentionOptions o = whole;
  if (whole_) return o;
  const auto narrow = [](OptionalTensor& t, int64_t dimension, int64_t start, int64_t length) {
    if (t && t->dim() > 0) t = t->narrow(dimension, start, length);
  };
  const int64_t first_head = first_key_head_ * group_, heads = key_heads_ * group_;
  narrow(o.head_alpha, 0, first_head, heads);
  narrow(o.alibi_slopes, -1, first_head, heads);
  if (!packed_) {
    narrow(o.q_seqlens, 0, first_entry_, entries_);
    narrow(o.kv_seqlens, 0, first_entry_, entries_);
    if (o.alibi_slopes && o.alibi_slopes->dim() == 2) narrow(o.alibi_slopes, 0, first_entry_, entries_);
  }
  return o;
}

}  // namespace adasplash::cuda

// For tests: sets what the scratch of a launch may take, in bytes; returns what it was.
extern "C" __attribute__((visibility("default"))) int64_t adasplash_limit_scratch(int64_t bytes) {
  return adasplash::cuda::scratch_limit.exchange(bytes);
}

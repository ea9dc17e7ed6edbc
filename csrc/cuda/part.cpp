#include "cuda/part.h"

#include <algorithm>
#include <atomic>

#include "cuda/few.h"
#include "cuda/sides.h"

namespace adasplash::cuda {
namespace {

std::atomic<int64_t> scratch_limit{int64_t{1} << 26};  // bytes

// The largest of as few parts of `total` as have at most `most` each, or else one, and differ little.
int64_t evenly(int64_t total, int64_t most) {
  const int64_t allowed = std::clamp<int64_t>(most, 1, total);
  const int64_t parts = (total + allowed - 1) / allowed;
  return (total + parts - 1) / parts;
}

// What one key head with its query heads, of one entry of the batch (or of all packed sequences), takes of scratch, in
// bytes: what grows with pairs of tiles and with tile rows. A few bytes for each row or head are not counted, as the
// call's own tensors have more.
int64_t bytes_of_key_head(const AttentionInputs& inputs, int64_t batch, int64_t group, const Scratch& scratch) {
  const StoredSide queries = StoredSide::of_queries(inputs), keys = StoredSide::of_keys(inputs);
  const int64_t sequences = queries.packed ? batch : 1, stored = keys.packed ? 1 : sequences;
  Extents extents = Extents::of_tiles({.tile_rows = group * queries.tile_rows, .max_seqlen = queries.max_seqlen},
                                      {.tile_rows = stored * keys.tile_rows, .max_seqlen = keys.max_seqlen});
  add_few(extents, inputs, sequences, stored);
  return scratch.words(extents) * int64_t{sizeof(int32_t)};
}

}  // namespace

std::vector<Part> Part::all(const AttentionInputs& inputs, const Scratch& scratch) {
  const auto& [op, query, key, value, options, first] = inputs;
  Part part;
  const bool packed = part.packed_ = options.packed();
  part.keys_by_entry_ = !packed && !options.paged();
  const int64_t sequences = AttentionShape::of(query, key, value, options).batch.expect_int();
  const int64_t batch = packed ? 1 : sequences, kv_heads = key.size(1);
  const int64_t group = part.group_ = kv_heads ? query.size(1) / kv_heads : 0;
  const int64_t of_head = bytes_of_key_head(inputs, sequences, group, scratch);
  const int64_t limit = scratch_limit;
  if (of_head == 0 || of_head * kv_heads * batch <= limit) return {part};

  part.whole_ = false;
  part.entries_ = evenly(batch, limit / (of_head * kv_heads));
  part.kv_heads_ = part.entries_ > 1 ? kv_heads : evenly(kv_heads, limit / of_head);
  std::vector<Part> parts;
  for (int64_t entry = 0; entry < batch; entry += part.entries_) {
    for (int64_t head = 0; head < kv_heads; head += part.kv_heads_) {
      Part& next = parts.emplace_back(part);
      next.first_entry_ = entry;
      next.entries_ = std::min(part.entries_, batch - entry);
      next.first_kv_head_ = head;
      next.kv_heads_ = std::min(part.kv_heads_, kv_heads - head);
    }
  }
  return parts;
}

at::Tensor Part::narrowed(const at::Tensor& t, bool by_entry, int64_t head_dimension, int64_t heads_a_kv_head) const {
  if (whole_) return t;
  const at::Tensor entries = by_entry ? t.narrow(0, first_entry_, entries_) : t;
  return entries.narrow(head_dimension, first_kv_head_ * heads_a_kv_head, kv_heads_ * heads_a_kv_head);
}

AttentionOptions Part::options(const AttentionOptions& whole) const {
  AttentionOptions o = whole;
  if (whole_) return o;
  const auto narrow = [](OptionalTensor& t, int64_t dimension, int64_t start, int64_t length) {
    if (t && t->dim() > 0) t = t->narrow(dimension, start, length);
  };
  const int64_t first_head = first_kv_head_ * group_, heads = kv_heads_ * group_;
  narrow(o.head_alpha, 0, first_head, heads);
  narrow(o.alibi_slopes, -1, first_head, heads);
  if (!packed_) {
    narrow(o.q_seqlens, 0, first_entry_, entries_);
    narrow(o.kv_seqlens, 0, first_entry_, entries_);
    narrow(o.kv_starts, 0, first_entry_, entries_);
    narrow(o.q_positions, 0, first_entry_, entries_);
    narrow(o.dropout_origin, 0, first_entry_, entries_);
    narrow(o.block_table, 0, first_entry_, entries_);
    if (o.alibi_slopes && o.alibi_slopes->dim() == 2) narrow(o.alibi_slopes, 0, first_entry_, entries_);
  }
  return o;
}

}  // namespace adasplash::cuda

// For tests: sets what the scratch of a launch may take, in bytes; returns what it was.
extern "C" __attribute__((visibility("default"))) int64_t adasplash_limit_scratch(int64_t bytes) {
  return adasplash::cuda::scratch_limit.exchange(bytes);
}

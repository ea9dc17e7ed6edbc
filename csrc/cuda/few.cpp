#include "cuda/few.h"

#include <bit>
#include <cstdlib>
#include <limits>
#include <string_view>

#include "cuda/launchers.h"
#include "cuda/sides.h"

namespace adasplash::cuda {
namespace {

// Bytes from a page of an index to the next: the kernels multiply numbers of 32 bits.
constexpr int64_t kMostIndexBytes = std::numeric_limits<int32_t>::max();
// Keys that there is room for in a sequence from which on they are found faster by an index: in pages, and in a padded
// cache of heads of more than kSmallHead.
constexpr int64_t kManyPagedKeys = 65536, kManyKeys = 131072, kSmallHead = 64;
constexpr int64_t kLeastEvenPage = 16;  // ROWS_TOGETHER of triton_src/lib/matrices.py
// Rows, queries times heads that share a key head, up to which a block of them is no fuller than the keys' way is
// worth.
constexpr int64_t kMostFewRows = 64, kMostFewQueries = 16;
constexpr int64_t kLeastBlock = 64;  // block_d of the smallest variants
constexpr int64_t kRowBlock = 16;    // block_m of score_found (tests/kernels/test_variants.py)

}  // namespace

FewQueries FewQueries::of(const AttentionInputs& inputs) {
  const auto& [op, query, key, value, options, first] = inputs;
  FewQueries few{.longest = StoredSide::of_queries(inputs).max_seqlen,
                 .lengths_vary = options.packed() || options.q_seqlens.has_value()};
  if (options.dropout_p > 0 || key.size(1) == 0) return few;  // dropped weights have no code of their own there
  const int64_t most = std::min(kMostFewQueries, kMostFewRows / (query.size(1) / key.size(1)));
  if (most > 0) few.most = most;
  return few;
}

bool has_even_pages(const AttentionInputs& inputs) {
  return inputs.options.paged() && inputs.query.scalar_type() != at::kFloat && inputs.key.size(2) >= kLeastEvenPage &&
         std::has_single_bit(static_cast<uint64_t>(inputs.key.size(2)));
}

bool uses_index(const AttentionInputs& inputs) {
  const AttentionOptions& options = inputs.options;
  if (!options.key_index || inputs.key.numel() == 0) return false;
  if (options.softmax() || inputs.query.scalar_type() != at::kBFloat16) return false;
  if (options.paged() && (!has_even_pages(inputs) || options.key_index->size(1) > kMostIndexBytes)) return false;
  // Asked at every call, so that both ways can be timed in one process.
  if (const char* const wanted = std::getenv("ADASPLASH_KEY_INDEX")) {
    if (std::string_view(wanted) == "read") return true;
    if (std::string_view(wanted) == "leave") return false;
  }
  const int64_t room = most_visible(inputs, FewQueries::of(inputs).queries());
  return options.paged() ? room >= kManyPagedKeys : room >= kManyKeys && inputs.key.size(3) > kSmallHead;
}

void add_few(Extents& extents, const AttentionInputs& inputs, int64_t kv_heads, int64_t stored_kv_heads) {
  const auto& [op, query, key, value, options, first] = inputs;
  const FewQueries few = FewQueries::of(inputs);
  if (!few.some()) return;
  const StoredSide keys = StoredSide::of_keys(inputs);
  const int64_t rows = few.queries() * (query.size(1) / key.size(1));
  const auto block_d = static_cast<int64_t>(std::bit_ceil(
      static_cast<uint64_t>(std::max<int64_t>({query.sizes().back(), value.sizes().back(), kLeastBlock}))));
  extents.few_rows = kv_heads * rows;
  extents.few_tiles = stored_kv_heads * rows * keys.tile_rows;
  extents.few_splits = extents.few_rows * ((count_tiles(keys.max_seqlen) + kSplitTiles - 1) / kSplitTiles);
  extents.few_values = extents.few_splits * block_d;
  if (uses_index(inputs)) extents.few_found = kv_heads * ((rows + kRowBlock - 1) / kRowBlock) * keys.rows;
}

}  // namespace adasplash::cuda

// What a block of queries attended to: of each row how many keys have weight and the largest weight, of the block how
// many tiles of keys are seen, and how many of these hold weight.
#pragma once

#include <bit>

#include "cpu/scores.h"
#include "cpu/threshold.h"

namespace adasplash::cpu {
inline namespace CPU_CAPABILITY {

template <typename A>
struct SummaryBuffers {
  SummaryBuffers(int64_t head_dim, Arena& arena)
      : query(arena.take<A>(kQueryBlock * head_dim)),
        growth(arena.take<A>(kQueryBlock)),
        columns(arena.take<A>(kKeyBlock * head_dim)),
        z(arena.take<A>(kQueryBlock * kBlockStride<A>)) {}

  A *query, *growth, *columns, *z;
};

template <typename T, typename A>
class SummaryBlock {
 public:
  SummaryBlock(const SummaryHead<T, A>& head, int64_t first, Arena& arena)
      : head_(head),
        first_(first),
        rows_(std::min(kQueryBlock, head.queries - first)),
        buffers_(head.head_dim, arena),
        tiles_(head, first) {}

  TileCounts run() const {
    bool dense = false;
    for (int64_t i = first_; i < first_ + rows_; ++i) {
      head_.largest_weight[i] = largest_weight(i);
      head_.support_size[i] = listed_support(i);
      dense |= needs_scores(i);
    }
    if (dense) count_dense();
    return count_tiles();
  }

 private:
  A max(int64_t i) const { return head_.row_state[2 * i]; }
  A gap(int64_t i) const { return head_.row_state[2 * i + 1]; }
  bool is_softmax() const { return head_.alpha == 1; }

  // The weight of a row's maximum. A row that sees nothing has an infinite gap.
  A largest_weight(int64_t i) const {
    if (gap(i) == kInfinity<A>) return 0;
    if (is_softmax()) return std::exp(-gap(i));
    return static_cast<A>(std::pow(static_cast<double>(-gap(i)), 1 / head_.rate()));
  }

  bool overflowed(int64_t i) const {
    return head_.capacity == 0 || head_.support[i * head_.capacity] == kSupportOverflow;
  }
  // Whether the forward has counted what it did not list; that of another backend, or without room, has not.
  bool counted(int64_t i) const { return head_.capacity > 1 && head_.support[i * head_.capacity + 1] >= 0; }
  bool needs_scores(int64_t i) const {
    return !is_softmax() && overflowed(i) && !counted(i) && std::isfinite(gap(i)) && !head_.visible(i).empty();
  }

  // The support of a row whose keys are listed or counted, or that has them all, or none; of others 0, to be added to.
  int32_t listed_support(int64_t i) const {
    if (!std::isfinite(gap(i))) return 0;
    if (is_softmax()) return static_cast<int32_t>(head_.visible(i).size());
    if (overflowed(i)) return counted(i) ? head_.support[i * head_.capacity + 1] : 0;
    const int32_t* support = head_.support + i * head_.capacity;
    return static_cast<int32_t>(std::find(support, support + head_.capacity, kEndOfSupport) - support);
  }

  // The products are those of the forward, so that the same keys are above the threshold.
  void count_dense() const {
    const auto rows = in_type<A>(head_.query, first_, rows_, head_.head_dim, buffers_.query);
    const Factors<A> query = factors_of(rows, rows_, head_.head_dim, buffers_.query, buffers_.growth);
    for_key_blocks(head_, first_, rows_, [&](Interval keys) {
      if (!tiles_.any(keys)) return;
      block_scores(head_, query, rows_, [&](int64_t r) { return first_ + r; }, keys, buffers_.columns, buffers_.z);
      for (int64_t r = 0; r < rows_; ++r) {
        const int64_t i = first_ + r;
        const Interval visible = head_.visible(i).clip(keys.begin, keys.end);
        if (visible.empty() || !needs_scores(i)) continue;
        const A* z = buffers_.z + r * kBlockStride<A> + (visible.begin - keys.begin);
        const A above = max(i), least = gap(i);
        int32_t count = 0;
        for (int64_t e = 0; e < visible.size(); ++e) count += (z[e] - above) - least > 0;
        head_.support_size[i] += count;
      }
    });
  }

  TileCounts count_tiles() const {
    const Interval seen = head_.visible(first_, first_ + rows_ - 1);
    TileCounts counts;
    if (!seen.empty()) counts.visible = adasplash::count_tiles(seen.end) - seen.begin / kTile;
    for (int64_t word = 0; word < head_.tile_words; ++word) {
      counts.weighing += std::popcount(static_cast<uint32_t>(head_.tiles[first_ / kTile * head_.tile_words + word]));
    }
    return counts;
  }

  const SummaryHead<T, A>& head_;
  const int64_t first_, rows_;
  const SummaryBuffers<A> buffers_;
  const TileBits tiles_;
};

}  // namespace CPU_CAPABILITY
}  // namespace adasplash::cpu

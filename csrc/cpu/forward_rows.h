// What the forward of a block of queries does for entmax (forward_block.h) and for softmax (softmax_block.h) alike:
// scores of a block of keys, weighted values, and what is written of a row.
#pragma once

#include <numeric>

#include "cpu/candidates.h"
#include "cpu/scores.h"

namespace adasplash::cpu {
inline namespace CPU_CAPABILITY {

template <typename A>
struct ForwardBuffers {
  // A row whose weights are found by passes over all its keys.
  struct DenseRow {
    int64_t r;  // in the block
    A max, gap;
    Sums sums;
    bool settled;
    int64_t support = 0;
  };

  ForwardBuffers(int64_t head_dim, int64_t value_dim, Arena& arena)
      : candidates(arena.take<Candidates<A>>(kQueryBlock)),
        dense(arena.take<DenseRow>(kQueryBlock)),
        z(arena.take<A>(kQueryBlock * Candidates<A>::kSlots)),
        key(arena.take<int32_t>(kQueryBlock * Candidates<A>::kSlots)),
        block(arena.take<A>(kQueryBlock * kBlockStride<A>)),
        query(arena.take<A>(kQueryBlock * head_dim)),
        growth(arena.take<A>(kQueryBlock)),
        columns(arena.take<A>(kKeyBlock * std::max(head_dim, value_dim))),
        out(arena.take<A>(kQueryBlock * value_dim)) {}

  Candidates<A>* candidates;  // a row each
  DenseRow* dense;
  A* z;  // lists of the candidates
  int32_t* key;
  A* block;           // z, later weights, of the block of queries and one block of keys
  A *query, *growth;  // the queries where they do not lie as products need them, and their growth (scores.h)
  A* columns;         // converted keys or values
  A* out;
};

template <typename T, typename A>
class ForwardRows {
 public:
  ForwardRows(const ForwardHead<T, A>& head, int64_t first, Arena& arena)
      : head_(head),
        first_(first),
        rows_(std::min(kQueryBlock, head.queries - first)),
        buffers_(head.head_dim, head.value_dim, arena),
        query_(factors_of(in_type<A>(head.query, first, rows_, head.head_dim, buffers_.query), rows_, head.head_dim,
                          buffers_.query, buffers_.growth)),
        tiles_(head, first) {}

 protected:
  void compute_block(Interval keys) {
    block_scores(head_, query_, rows_, [&](int64_t r) { return first_ + r; }, keys, buffers_.columns, buffers_.block);
  }
  // The z of a row with the keys that it sees of a block, padded with -inf.
  A* padded_z(int64_t r, Interval keys, Interval visible, int64_t padding) {
    A* z = buffers_.block + r * kBlockStride<A> + (visible.begin - keys.begin);
    pad_z(z, visible.size(), padding);
    return z;
  }

  // Keys of a block that a row does not see have no weight in the product.
  void clear_hidden(int64_t r, Interval keys, Interval visible) {
    A* block = buffers_.block + r * kBlockStride<A>;
    if (visible.empty()) visible = {keys.end, keys.end};
    std::fill_n(block, visible.begin - keys.begin, A(0));
    std::fill(block + (visible.end - keys.begin), block + keys.size(), A(0));
  }

  // Adds the values of a block of keys, weighted, to all rows of `out`. The product is of whole blocks, so that its
  // bits, and with them every row's, do not depend on which rows have weights there. `guarded`, values that are not
  // finite reach only the rows that give them weight.
  void add_values(Interval keys, bool guarded) {
    const int64_t dim = head_.value_dim;
    const auto add_where_it_weighs = [&](int64_t e, const A* value) {
      for (int64_t r = 0; r < rows_; ++r) {
        const A weight = buffers_.block[r * kBlockStride<A> + e];
        if (weight > 0) add_scaled(weight, value, dim, buffers_.out + r * dim);
      }
    };
    const Rows<const A> values = guarded ? finite_rows(head_.value, keys, dim, buffers_.columns, add_where_it_weighs)
                                         : in_type<A>(head_.value, keys.begin, keys.size(), dim, buffers_.columns);
    Gemm<A>::nn(rows_, dim, keys.size(), A(1), buffers_.block, kBlockStride<A>, values.data, values.stride, A(1),
                buffers_.out, dim);
  }
  bool out_is_finite(int64_t r) const { return all_finite(buffers_.out + r * head_.value_dim, head_.value_dim); }

  // Of a support that may not fit it is said so, and how many keys it has.
  void save_state(int64_t r, A max, A gap, int32_t first_support, int64_t count = 0) {
    if (head_.row_state == nullptr) return;
    head_.row_state[2 * (first_ + r)] = max;
    head_.row_state[2 * (first_ + r) + 1] = gap;
    int32_t* support = support_of(r);
    std::fill_n(support, head_.capacity, kEndOfSupport);
    if (head_.capacity > 0) support[0] = first_support;
    if (head_.capacity > 1 && first_support == kSupportOverflow) support[1] = static_cast<int32_t>(count);
  }
  int32_t* support_of(int64_t r) { return head_.support + (first_ + r) * head_.capacity; }

  // `total` is the sum of the weights, which for entmax is one but for the rounding of the gap.
  void write_out(int64_t r, A* out, double total = 1) {
    for (int64_t d = 0; d < head_.value_dim; ++d) out[d] *= static_cast<A>(1 / total);
    convert_back(out, head_.value_dim, head_.out[first_ + r]);
  }

  // A row whose candidates are all in its list, which becomes its support.
  template <typename Weights>
  void finish_list(const Weights& weights, Candidates<A>& row, int64_t r) {
    const A gap = solve(weights, row.z, row.count, row.max, row.gap_bound());
    int64_t count = 0;
    for (int64_t i = 0; i < row.count; ++i) {
      row.z[count] = row.z[i];
      row.key[count] = row.key[i];
      count += (row.z[i] - row.max) - gap > 0;
    }
    const bool fits = count <= head_.capacity;
    save_state(r, row.max, gap, fits ? kEndOfSupport : kSupportOverflow, count);
    if (fits) std::copy_n(row.key, count, support_of(r));
    for (int64_t i = 0; i < count; ++i) tiles_.set(row.key[i]);

    pad_z(row.z, count, kLanes<A>);
    const double total = to_weights(weights, row.z, count, row.max, gap);
    drop(head_.dropout, first_ + r, count, [&](int32_t e) { return row.key[e]; }, row.z);
    int64_t kept = 0;  // a weight of 0 reads no value
    for (int64_t i = 0; i < count; ++i) {
      row.z[kept] = row.z[i];
      row.key[kept] = row.key[i];
      kept += row.z[i] != 0;
    }
    weighted_sum(row.z, row.key, kept, head_.value, head_.value_dim, buffers_.out);
    write_out(r, buffers_.out, total);
  }

  // What is saved of a row at alpha = 1, all of whose keys have weight.
  void save_softmax(int64_t r, Interval visible, A max, double total) {
    const bool fits = visible.size() <= head_.capacity;
    save_state(r, max, static_cast<A>(std::log(total)), fits ? kEndOfSupport : kSupportOverflow, visible.size());
    if (fits) std::iota(support_of(r), support_of(r) + visible.size(), static_cast<int32_t>(visible.begin));
    tiles_.set(visible);
  }

  // No visible key: a threshold at inf leaves no key any weight.
  void finish_empty(int64_t r) {
    std::fill_n(buffers_.out, head_.value_dim, A(0));
    write_out(r, buffers_.out);
    save_state(r, 0, kInfinity<A>, kEndOfSupport);
  }

  // A score that is NaN or infinite makes the whole row NaN, in the backward too.
  void finish_nan(int64_t r, Interval visible) {
    std::fill_n(buffers_.out, head_.value_dim, kNaN<A>);
    write_out(r, buffers_.out);
    save_state(r, kNaN<A>, kNaN<A>, kSupportOverflow);
    tiles_.set(visible);
  }

  const ForwardHead<T, A>& head_;
  const int64_t first_, rows_;
  ForwardBuffers<A> buffers_;
  const Factors<A> query_;
  TileBits tiles_;
};

}  // namespace CPU_CAPABILITY
}  // namespace adasplash::cpu

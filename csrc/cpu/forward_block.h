// The forward of one block of queries: one matrix product a block of keys, a scan that keeps candidates, the threshold
// on the short list, and the output gathered from the support. Rows with too many candidates are finished by passes
// over all their keys, at the cost of dense blockwise attention.
#pragma once

#include "cpu/candidates.h"
#include "cpu/scores.h"

namespace adasplash::cpu {
inline namespace CPU_CAPABILITY {

template <typename A>
struct ForwardBuffers {
  struct DenseRow {
    int64_t r;  // in the block
    A max, gap;
    Sums sums;
    bool settled;
  };

  ForwardBuffers(int64_t head_dim, int64_t value_dim, Arena& arena)
      : candidates(arena.take<Candidates<A>>(kQueryBlock)),
        dense(arena.take<DenseRow>(kQueryBlock)),
        z(arena.take<A>(kQueryBlock * Candidates<A>::kSlots)),
        key(arena.take<int32_t>(kQueryBlock * Candidates<A>::kSlots)),
        block(arena.take<A>(kQueryBlock * kBlockStride<A>)),
        query(arena.take<A>(kQueryBlock * head_dim)),
        columns(arena.take<A>(kKeyBlock * std::max(head_dim, value_dim))),
        out(arena.take<A>(kQueryBlock * value_dim)) {}

  Candidates<A>* candidates;  // a row each
  DenseRow* dense;            // the rows whose candidates did not fit
  A* z;                       // lists of the candidates
  int32_t* key;
  A* block;            // z, later weights, of the block of queries and one block of keys
  A *query, *columns;  // converted copies, where the tensors have another type
  A* out;
};

template <typename T, typename A, typename Weights>
class ForwardBlock {
 public:
  ForwardBlock(const ForwardHead<T, A>& head, int64_t first, const Weights& weights, Arena& arena)
      : head_(head),
        first_(first),
        rows_(std::min(kQueryBlock, head.queries - first)),
        weights_(weights),
        buffers_(head.head_dim, head.value_dim, arena),
        query_(in_type<A>(head.query, first, rows_, head.head_dim, buffers_.query)),
        tiles_(head, first) {}

  void run() {
    find_candidates();
    for (int64_t r = 0; r < rows_; ++r) {
      const Candidates<A>& row = buffers_.candidates[r];
      const Interval visible = head_.visible(first_ + r);
      if (visible.empty()) {
        finish_empty(r);
      } else if (!std::isfinite(row.max)) {
        finish_nan(r, visible);
      } else if (row.overflowed) {
        buffers_.dense[dense_count_++] = {r, row.max, row.gap_bound(), {}, false};
      } else {
        finish_list(r);
      }
    }
    if (dense_count_ > 0) {
      find_dense_thresholds();
      finish_dense();
    }
  }

 private:
  using DenseRow = typename ForwardBuffers<A>::DenseRow;

  void compute_block(Interval keys) {
    block_scores(head_, query_, rows_, [&](int64_t r) { return first_ + r; }, keys, buffers_.columns, buffers_.block);
  }
  // The z of a row with the keys that it sees of a block, padded with -inf.
  A* padded_z(int64_t r, Interval keys, Interval visible, int64_t padding) {
    A* z = buffers_.block + r * kBlockStride<A> + (visible.begin - keys.begin);
    pad_z(z, visible.size(), padding);
    return z;
  }

  void find_candidates() {
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t slot = r * Candidates<A>::kSlots;
      buffers_.candidates[r] = Candidates<A>{buffers_.z + slot, buffers_.key + slot};
    }
    for_key_blocks(head_, first_, rows_, [&](Interval keys) {
      compute_block(keys);
      for (int64_t r = 0; r < rows_; ++r) {
        const Interval visible = head_.visible(first_ + r).clip(keys.begin, keys.end);
        if (visible.empty()) continue;
        const A* z = padded_z(r, keys, visible, Candidates<A>::kStep);
        buffers_.candidates[r].scan(weights_, z, visible.size(), visible.begin);
      }
    });
  }

  void save_state(int64_t r, A max, A gap, int32_t first_support) {
    if (head_.row_state == nullptr) return;
    head_.row_state[2 * (first_ + r)] = max;
    head_.row_state[2 * (first_ + r) + 1] = gap;
    int32_t* support = head_.support + (first_ + r) * head_.capacity;
    std::fill_n(support, head_.capacity, kEndOfSupport);
    if (head_.capacity > 0) support[0] = first_support;
  }

  // `total` is the sum of the weights, which is one but for the rounding of the gap.
  void write_out(int64_t r, A* out, double total = 1) {
    for (int64_t d = 0; d < head_.value_dim; ++d) out[d] *= static_cast<A>(1 / total);
    convert_back(out, head_.value_dim, head_.out[first_ + r]);
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

  void finish_list(int64_t r) {
    const Candidates<A>& row = buffers_.candidates[r];
    const A gap = solve(weights_, row.z, row.count, row.max, row.gap_bound());
    // In place, candidates become the support and z becomes weights.
    int64_t count = 0;
    for (int64_t i = 0; i < row.count; ++i) {
      row.z[count] = row.z[i];
      row.key[count] = row.key[i];
      count += (row.z[i] - row.max) - gap > 0;
    }
    pad_z(row.z, count, kLanes<A>);
    const double total = to_weights(weights_, row.z, count, row.max, gap);
    weighted_sum(row.z, row.key, count, head_.value, head_.value_dim, buffers_.out);
    write_out(r, buffers_.out, total);

    const bool fits = count <= head_.capacity;
    save_state(r, row.max, gap, kSupportOverflow);
    if (fits) std::copy_n(row.key, count, head_.support + (first_ + r) * head_.capacity);
    for (int64_t i = 0; i < count; ++i) tiles_.set(row.key[i]);
  }

  // Starts the sums of the dense rows anew and goes through the blocks of keys: calls add(row, keys, the keys of these
  // that it sees) for each of these rows once the block's z are there, then end_block(keys). The products are of whole
  // blocks, so that their bits, and with them every row's, do not depend on which rows are dense.
  template <typename Add, typename EndBlock>
  void for_dense_rows(const Add& add, const EndBlock& end_block) {
    for (int64_t d = 0; d < dense_count_; ++d) buffers_.dense[d].sums = {};
    for_key_blocks(head_, first_, rows_, [&](Interval keys) {
      compute_block(keys);
      for (int64_t d = 0; d < dense_count_; ++d) {
        DenseRow& row = buffers_.dense[d];
        add(row, keys, head_.visible(first_ + row.r).clip(keys.begin, keys.end));
      }
      end_block(keys);
    });
  }

  void find_dense_thresholds() {
    bool all_settled = false;
    for (int step = 0; step < kMaxSteps && !all_settled; ++step) {
      for_dense_rows(
          [&](DenseRow& row, Interval keys, Interval visible) {
            if (row.settled || visible.empty()) return;
            const A* z = padded_z(row.r, keys, visible, kLanes<A>);
            add_sums(weights_, z, visible.size(), row.max, row.gap, row.sums);
          },
          [](Interval) {});
      all_settled = true;
      for (int64_t d = 0; d < dense_count_; ++d) {
        DenseRow& row = buffers_.dense[d];
        if (row.settled) continue;
        row.settled = !step_on(weights_, row.sums, row.gap);
        all_settled &= row.settled;
      }
    }
  }

  void finish_dense() {
    std::fill_n(buffers_.out, rows_ * head_.value_dim, A(0));
    for_dense_rows(
        [&](DenseRow& row, Interval keys, Interval visible) {
          A* block = buffers_.block + row.r * kBlockStride<A>;
          if (visible.empty()) {
            std::fill_n(block, keys.size(), A(0));
            return;
          }
          A* weights = padded_z(row.r, keys, visible, kLanes<A>);
          row.sums.p += to_weights(weights_, weights, visible.size(), row.max, row.gap);
          for (int64_t i = 0; i < visible.size(); ++i) {
            if (weights[i] > 0) tiles_.set(visible.begin + i);
          }
          // Keys that this row does not see have no weight in the product.
          std::fill(block, weights, A(0));
          std::fill(weights + visible.size(), block + keys.size(), A(0));
        },
        [&](Interval keys) {
          const Rows<const A> values =
              in_type<A>(head_.value, keys.begin, keys.size(), head_.value_dim, buffers_.columns);
          Gemm<A>::nn(rows_, head_.value_dim, keys.size(), A(1), buffers_.block, kBlockStride<A>, values.data,
                      values.stride, A(1), buffers_.out, head_.value_dim);
        });
    for (int64_t d = 0; d < dense_count_; ++d) {
      const DenseRow& row = buffers_.dense[d];
      write_out(row.r, buffers_.out + row.r * head_.value_dim, row.sums.p);
      save_state(row.r, row.max, row.gap, kSupportOverflow);
    }
  }

  const ForwardHead<T, A>& head_;
  const int64_t first_, rows_;
  const Weights& weights_;
  ForwardBuffers<A> buffers_;
  const Rows<const A> query_;
  TileBits tiles_;
  int64_t dense_count_ = 0;
};

}  // namespace CPU_CAPABILITY
}  // namespace adasplash::cpu

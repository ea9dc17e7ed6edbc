// The forward of one block of queries: one matrix product a block of keys, a scan that keeps candidates, the threshold
// on the short list, and the output gathered from the support. Rows with too many candidates are finished by passes
// over all their keys, at the cost of dense blockwise attention.
#pragma once

#include "cpu/forward_rows.h"

namespace adasplash::cpu {
inline namespace CPU_CAPABILITY {

template <typename T, typename A, typename Weights>
class ForwardBlock : ForwardRows<T, A> {
 public:
  ForwardBlock(const ForwardHead<T, A>& head, int64_t first, const Weights& weights, Arena& arena)
      : ForwardRows<T, A>(head, first, arena), weights_(weights) {}

  void run() {
    find_candidates();
    for (int64_t r = 0; r < rows_; ++r) {
      Candidates<A>& row = buffers_.candidates[r];
      const Interval visible = head_.visible(first_ + r);
      if (visible.empty()) {
        Base::finish_empty(r);
      } else if (!std::isfinite(row.max)) {
        Base::finish_nan(r, visible);
      } else if (row.overflowed) {
        buffers_.dense[dense_count_++] = {r, row.max, row.gap_bound(), {}, false};
      } else {
        Base::finish_list(weights_, row, r);
      }
    }
    if (dense_count_ > 0) {
      find_dense_thresholds();
      finish_dense();
    }
  }

 private:
  using Base = ForwardRows<T, A>;
  using Base::buffers_, Base::first_, Base::head_, Base::rows_, Base::tiles_;
  using DenseRow = typename ForwardBuffers<A>::DenseRow;

  void find_candidates() {
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t slot = r * Candidates<A>::kSlots;
      buffers_.candidates[r] = Candidates<A>{buffers_.z + slot, buffers_.key + slot};
    }
    for_key_blocks(head_, first_, rows_, [&](Interval keys) {
      Base::compute_block(keys);
      for (int64_t r = 0; r < rows_; ++r) {
        const Interval visible = head_.visible(first_ + r).clip(keys.begin, keys.end);
        if (visible.empty()) continue;
        const A* z = Base::padded_z(r, keys, visible, Candidates<A>::kStep);
        buffers_.candidates[r].scan(weights_, z, visible.size(), visible.begin);
      }
    });
  }

  // Starts the sums of the dense rows anew and goes through the blocks of keys: calls add(row, keys, the keys of these
  // that it sees) for each of these rows once the block's z are there, then end_block(keys).
  template <typename Add, typename EndBlock>
  void for_dense_rows(const Add& add, const EndBlock& end_block) {
    for (int64_t d = 0; d < dense_count_; ++d) {
      buffers_.dense[d].sums = {};
      buffers_.dense[d].support = 0;
    }
    for_key_blocks(head_, first_, rows_, [&](Interval keys) {
      Base::compute_block(keys);
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
            const A* z = Base::padded_z(row.r, keys, visible, kLanes<A>);
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
    weigh_dense(/*guarded=*/false);
    bool finite = true;
    for (int64_t d = 0; d < dense_count_; ++d) finite &= Base::out_is_finite(buffers_.dense[d].r);
    if (!finite) weigh_dense(/*guarded=*/true);
    for (int64_t d = 0; d < dense_count_; ++d) {
      const DenseRow& row = buffers_.dense[d];
      Base::write_out(row.r, buffers_.out + row.r * head_.value_dim, row.sums.p);
      Base::save_state(row.r, row.max, row.gap, kSupportOverflow, row.support);
    }
  }

  // The weighted values of the dense rows, into `out`, the sums of their weights, and the tiles that hold any.
  void weigh_dense(bool guarded) {
    std::fill_n(buffers_.out, rows_ * head_.value_dim, A(0));
    for_dense_rows(
        [&](DenseRow& row, Interval keys, Interval visible) {
          if (visible.empty()) return Base::clear_hidden(row.r, keys, visible);
          A* weights = Base::padded_z(row.r, keys, visible, kLanes<A>);
          row.sums.p += to_weights(weights_, weights, visible.size(), row.max, row.gap);
          for (int64_t i = 0; i < visible.size(); ++i) {
            if (weights[i] > 0) tiles_.set(visible.begin + i);
            row.support += weights[i] > 0;
          }
          const auto key_of = [&](int32_t e) { return visible.begin + e; };
          drop(head_.dropout, first_ + row.r, visible.size(), key_of, weights);
          Base::clear_hidden(row.r, keys, visible);
        },
        [&](Interval keys) { Base::add_values(keys, guarded); });
  }

  const Weights& weights_;
  int64_t dense_count_ = 0;
};

}  // namespace CPU_CAPABILITY
}  // namespace adasplash::cpu

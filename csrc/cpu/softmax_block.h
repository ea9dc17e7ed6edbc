// The forward of one block of queries at alpha = 1: softmax in one pass over the blocks of keys. What was summed is
// scaled down whenever a row's maximum grows (Milakov and Gimelshein, "Online normalizer calculation for softmax",
// 2018).
#pragma once

#include "cpu/forward_rows.h"

namespace adasplash::cpu {
inline namespace CPU_CAPABILITY {

template <typename T, typename A>
class SoftmaxBlock : ForwardRows<T, A> {
 public:
  using ForwardRows<T, A>::ForwardRows;

  void run() {
    weigh_all(/*guarded=*/false);
    bool finite = true;
    for (int64_t r = 0; r < rows_; ++r) finite &= !std::isfinite(row(r).max) || Base::out_is_finite(r);
    if (!finite) weigh_all(/*guarded=*/true);
    for (int64_t r = 0; r < rows_; ++r) {
      if (std::isfinite(row(r).max)) finish(r, head_.visible(first_ + r));
    }
    for (int64_t r = 0; r < rows_; ++r) {  // these use memory of finished rows
      if (std::isfinite(row(r).max)) continue;
      const Interval visible = head_.visible(first_ + r);
      visible.empty() ? Base::finish_empty(r) : Base::finish_nan(r, visible);
    }
  }

 private:
  using Base = ForwardRows<T, A>;
  using Base::buffers_, Base::first_, Base::head_, Base::rows_;
  using DenseRow = typename ForwardBuffers<A>::DenseRow;

  DenseRow& row(int64_t r) { return buffers_.dense[r]; }

  // The maximum of each row, the sum of its weights, of which that of the maximum is 1, and its values, weighted so.
  void weigh_all(bool guarded) {
    std::fill_n(buffers_.out, rows_ * head_.value_dim, A(0));
    for (int64_t r = 0; r < rows_; ++r) row(r) = {r, -kInfinity<A>, A(0), {}, false};
    for_key_blocks(head_, first_, rows_, [&](Interval keys) {
      Base::compute_block(keys);
      for (int64_t r = 0; r < rows_; ++r) {
        const Interval visible = head_.visible(first_ + r).clip(keys.begin, keys.end);
        Base::clear_hidden(r, keys, visible.empty() || weigh(row(r), keys, visible) ? visible : Interval{0, 0});
      }
      Base::add_values(keys, guarded);
    });
  }

  // Turns the z of a row with the keys that it sees of a block into weights. False if it has none, as its maximum is
  // not finite.
  bool weigh(DenseRow& row, Interval keys, Interval visible) {
    A* z = Base::padded_z(row.r, keys, visible, kLanes<A>);
    const A before = row.max;
    Vec<A> largest(before);
    for (int64_t i = 0; i < visible.size(); i += kLanes<A>) largest = at::vec::maximum(largest, Vec<A>::loadu(z + i));
    row.max = max_lanes(largest);
    if (!std::isfinite(row.max)) return false;
    if (row.max > before) {
      const A shrunk = std::exp(before - row.max);
      A* out = buffers_.out + row.r * head_.value_dim;
      row.sums.p *= shrunk;
      if (shrunk == 0) {  // what had weight until now has none any more, NaN neither
        std::fill_n(out, head_.value_dim, A(0));
      } else {
        scale_by(shrunk, head_.value_dim, out);
      }
    }
    row.sums.p += to_weights(Softmax<A>(), z, visible.size(), row.max, A(0));
    drop(head_.dropout, first_ + row.r, visible.size(), [&](int32_t e) { return visible.begin + e; }, z);
    return true;
  }

  void finish(int64_t r, Interval visible) {
    Base::write_out(r, buffers_.out + r * head_.value_dim, row(r).sums.p);
    Base::save_softmax(r, visible, row(r).max, row(r).sums.p);
  }
};

}  // namespace CPU_CAPABILITY
}  // namespace adasplash::cpu

// The forward of a sequence of few queries: rows of all query heads that share a key head go over its keys together, in
// steps whose tasks are pieces of the keys, so that threads share one head's keys and each key is read once.
//
//   few_scores  (key head, piece of its keys)  z of all rows, and the largest z of each block
//   few_weigh   (query head)                   thresholds; finishes rows with few candidates, else turns z to weights
//   few_values  (key head, piece of its keys)  the weighted values of what is left, a partial sum for each piece
//   few_join    (query head)                   adds these in the order of the pieces
//
// Products of up to 15 rows are loops over the keys where they lie: BLAS would have to be given them in float32, evenly
// spaced, and is slow where one side has few rows.
#pragma once

#include <utility>

#include "cpu/forward_rows.h"
#include "cpu/kernels.h"

namespace adasplash::cpu {
inline namespace CPU_CAPABILITY {

constexpr int64_t kLeastBlasRows = 16;

// From kLanes vectors the sums of their lanes, as the lanes of one.
template <typename A>
inline Vec<A> lane_sums(Vec<A>* v) {
  for (int64_t count = kLanes<A>; count > 1; count /= 2) {
    for (int64_t i = 0; i < count / 2; ++i) {
      const auto [even, odd] = at::vec::deinterleave2(v[2 * i], v[2 * i + 1]);
      v[i] = even + odd;
    }
  }
  return v[0];
}

// Calls f(0), f(1) and so on with constants.
template <int64_t count, typename F>
ADASPLASH_INLINE void unrolled(const F& f) {
  [&]<int64_t... i>(std::integer_sequence<int64_t, i...>) ADASPLASH_INLINE_LAMBDA {
    (f(std::integral_constant<int64_t, i>()), ...);
  }(std::make_integer_sequence<int64_t, count>());
}

// Products of `rows` queries with kLanes / rows keys. Queries are `width` apart, with zeros from dim on; z has the rows
// of the queries. The sums stay in registers only if what indexes them is constant when the compiler first looks: it
// stores all of them in every step otherwise, which takes three times as long.
template <int64_t rows, typename A, typename T>
inline void few_products(const A* query, int64_t width, const T* const* key, int64_t dim, Rows<A> z) {
  constexpr int64_t keys = kLanes<A> / rows;
  static_assert(keys * rows == kLanes<A>, "a vector has a product in each lane");
  Vec<A> sum[kLanes<A>];
  unrolled<kLanes<A>>([&](auto i) ADASPLASH_INLINE_LAMBDA { sum[i] = Vec<A>(0); });
  const auto add = [&](int64_t d, int64_t lanes) ADASPLASH_INLINE_LAMBDA {
    Vec<A> q[rows];
    unrolled<rows>([&](auto r) ADASPLASH_INLINE_LAMBDA { q[r] = Vec<A>::loadu(query + r * width + d); });
    unrolled<keys>([&](auto k) ADASPLASH_INLINE_LAMBDA {
      const Vec<A> x = load<A>(key[k] + d, lanes);
      unrolled<rows>([&](auto r)
                         ADASPLASH_INLINE_LAMBDA { sum[r * keys + k] = at::vec::fmadd(q[r], x, sum[r * keys + k]); });
    });
  };
  int64_t d = 0;
  for (; d + kLanes<A> <= dim; d += kLanes<A>) add(d, kLanes<A>);
  if (d < dim) add(d, dim - d);

  Vec<A> sums[kLanes<A>];
  unrolled<kLanes<A>>([&](auto i) ADASPLASH_INLINE_LAMBDA { sums[i] = sum[i]; });
  A products[kLanes<A>];
  lane_sums(sums).store(products);
  for (int64_t r = 0; r < rows; ++r) std::copy_n(products + r * keys, keys, z[r]);
}

// The queries of a group of heads as products take them.
template <typename A>
struct FewBuffers {
  FewBuffers(int64_t head_dim, int64_t value_dim, Arena& arena)
      : width((head_dim + kLanes<A> - 1) / kLanes<A> * kLanes<A>),
        query(arena.take<A>(kMostFewRows * width)),
        growth(arena.take<A>(kMostFewRows)),
        keys(arena.take<A>(kKeyBlock * head_dim)),
        weights(arena.take<A>(kKeyBlock)),
        index(arena.take<int32_t>(kKeyBlock)),
        sum(arena.take<A>(value_dim)) {}

  int64_t width;
  A *query, *growth;
  A* keys;         // a block of keys in type A
  A* weights;      // those of a block that are not zero
  int32_t* index;  // their keys
  A* sum;
};

// few_scores.
template <typename T, typename A>
class FewScores {
 public:
  FewScores(const ForwardHead<T, A>* heads, int64_t group, const FewRows<A>& few, Arena& arena)
      : heads_(heads),
        queries_(heads->queries),
        rows_(group * queries_),
        few_(few),
        buffers_(heads->head_dim, heads->value_dim, arena) {
    std::fill_n(buffers_.query, rows_ * buffers_.width, A(0));
    for (int64_t r = 0; r < rows_; ++r) {
      A* query = buffers_.query + r * buffers_.width;
      convert(head(r).query[r % queries_], head(r).head_dim, query);
      buffers_.growth[r] = growth_of(query, head(r).head_dim);
      if (buffers_.growth[r] != 1) {
        for (int64_t d = 0; d < head(r).head_dim; ++d) query[d] /= buffers_.growth[r];
      }
    }
  }

  void run(int64_t piece) {
    for (int64_t b = few_.first_block(piece); b < few_.first_block(piece + 1); ++b) {
      const Interval keys = few_.keys_of(b);
      multiply_block(b, keys);
      for (int64_t r = 0; r < rows_; ++r) few_.block_max(r, b) = finish_row(r, keys, few_.z(r, b));
    }
  }

 private:
  const ForwardHead<T, A>& head(int64_t r) const { return heads_[r / queries_]; }

  void multiply_block(int64_t b, Interval keys) {
    A* const z = few_.z(0, b);
    if (rows_ >= kLeastBlasRows) {
      const Rows<const A> columns = in_type<A>(heads_->key, keys.begin, keys.size(), heads_->head_dim, buffers_.keys);
      Gemm<A>::nt(rows_, keys.size(), heads_->head_dim, A(1), buffers_.query, buffers_.width, columns.data,
                  columns.stride, A(0), z, FewRows<A>::kStride);
      return;
    }
    const T *key[kLanes<A>], *next[kLanes<A>];
    fetch(keys.begin, next);
    for (int64_t first = keys.begin; first < keys.end; first += kLanes<A>) {
      std::copy_n(next, kLanes<A>, key);
      fetch(first + kLanes<A>, next);
      const Rows<A> products{z + (first - keys.begin), FewRows<A>::kStride};
      int64_t r = 0;
      if constexpr (kLanes<A> >= 4) {  // a vector of NEON has two of double
        for (; r + 4 <= rows_; r += 4) multiply_rows<4>(r, key, products);
      }
      for (; r + 2 <= rows_; r += 2) multiply_rows<2>(r, key, products);
      if (r < rows_) multiply_rows<1>(r, key, products);
    }
  }

  // The rows of keys that come next, asked for in the order in which they lie: a product goes over many rows at once,
  // of which the processor does not guess what is needed.
  void fetch(int64_t first, const T** key) {
    constexpr int64_t kLine = 64 / sizeof(T);
    for (int64_t k = 0; k < kLanes<A>; ++k) {
      key[k] = heads_->key[std::min(first + k, few_.keys.end - 1)];
      for (int64_t d = 0; d < heads_->head_dim; d += kLine) __builtin_prefetch(key[k] + d);
    }
  }

  template <int64_t rows>
  void multiply_rows(int64_t r, const T* const* key, Rows<A> products) {
    const A* query = buffers_.query + r * buffers_.width;
    for (int64_t k = 0; k < kLanes<A>; k += kLanes<A> / rows) {
      few_products<rows>(query, buffers_.width, key + k, heads_->head_dim, {products[r] + k, products.stride});
    }
  }

  // From products to z; -inf where the row sees no key. Returns the largest.
  A finish_row(int64_t r, Interval keys, A* z) {
    const auto& head = this->head(r);
    const int64_t query = r % queries_;
    const Interval visible = head.visible(query).clip(keys.begin, keys.end);
    if (visible.empty()) {
      std::fill_n(z, kKeyBlock, -kInfinity<A>);
      return -kInfinity<A>;
    }
    const Vec<A> scale(head.z_scale());
    for (int64_t i = 0; i < keys.size(); i += kLanes<A>) (Vec<A>::loadu(z + i) * scale).store(z + i);
    scale_by(buffers_.growth[r], keys.size(), z);
    const A first = static_cast<A>(keys.begin - head.place(query));
    change_scores(head, keys.size(), [first](int32_t e) { return first + static_cast<A>(e); }, z);
    std::fill(z, z + (visible.begin - keys.begin), -kInfinity<A>);
    std::fill(z + (visible.end - keys.begin), z + kKeyBlock, -kInfinity<A>);
    Vec<A> largest(-kInfinity<A>);
    for (int64_t i = 0; i < kKeyBlock; i += kLanes<A>) largest = at::vec::maximum(largest, Vec<A>::loadu(z + i));
    return max_lanes(largest);
  }

  const ForwardHead<T, A>* const heads_;
  const int64_t queries_, rows_;
  const FewRows<A>& few_;
  FewBuffers<A> buffers_;
};

// few_weigh and few_join: rows of one head, whose FewRows start with its own.
template <typename T, typename A>
class FewHead : ForwardRows<T, A> {
 public:
  FewHead(const ForwardHead<T, A>& head, const FewRows<A>& few, Arena& arena)
      : ForwardRows<T, A>(head, /*first=*/0, arena), few_(few) {}

  // Whether values are to be added for any row.
  template <typename Weights>
  bool weigh(const Weights& weights) {
    bool any = false;
    for (int64_t r = 0; r < rows_; ++r) {
      few_.row(r).dense = !finished(weights, r);
      any |= few_.row(r).dense;
    }
    return any;
  }

  void join() {
    for (int64_t r = 0; r < rows_; ++r) {
      if (!few_.row(r).dense) continue;
      std::fill_n(buffers_.out, head_.value_dim, A(0));
      for (int64_t piece = 0; piece < few_.pieces(); ++piece) {
        add_scaled(A(1), few_.values(r, piece), head_.value_dim, buffers_.out);
      }
      Base::write_out(r, buffers_.out, few_.row(r).total);
    }
  }

 private:
  using Base = ForwardRows<T, A>;
  using Base::buffers_, Base::head_, Base::rows_, Base::tiles_;

  template <typename Weights>
  bool finished(const Weights& weights, int64_t r) {
    const Interval visible = head_.visible(r);
    if (visible.empty()) {
      Base::finish_empty(r);
      return true;
    }
    A max = -kInfinity<A>;
    for (int64_t b = 0; b < few_.blocks; ++b) {
      const A of_block = few_.block_max(r, b);
      if (std::isnan(of_block) || of_block > max) max = of_block;
      if (std::isnan(max)) break;
    }
    if (!std::isfinite(max)) {
      Base::finish_nan(r, visible);
      return true;
    }
    if constexpr (Weights::softmax) {
      finish_softmax(r, visible, max);
      return false;
    } else {
      return finished_as_list(weights, r, max);
    }
  }

  template <typename Weights>
  bool finished_as_list(const Weights& weights, int64_t r, A max) {
    Candidates<A> list{buffers_.z, buffers_.key};
    list.start_from(max);
    for (int64_t b = 0; b < few_.blocks && !list.overflowed; ++b) {
      if (few_.block_max(r, b) > list.bound) list.scan(weights, few_.z(r, b), kKeyBlock, few_.keys_of(b).begin);
    }
    if (list.overflowed) {
      weigh_all(weights, r, max, find_gap(weights, r, max, list.gap_bound()));
    } else {
      Base::finish_list(weights, list, r);
    }
    return !list.overflowed;
  }

  // Calls f(block, its z) for the blocks that may have weight at this gap.
  template <typename F>
  void for_weighing_blocks(int64_t r, A max, A gap, const F& f) {
    for (int64_t b = 0; b < few_.blocks; ++b) {
      if ((few_.block_max(r, b) - max) - gap > 0) f(b, few_.z(r, b));
    }
  }

  template <typename Weights>
  A find_gap(const Weights& weights, int64_t r, A max, A gap) {
    for (int step = 0; step < kMaxSteps; ++step) {
      Sums sums;
      for_weighing_blocks(r, max, gap, [&](int64_t, A* z) { add_sums(weights, z, kKeyBlock, max, gap, sums); });
      if (!step_on(weights, sums, gap)) break;
    }
    return gap;
  }

  // Turns the row's z into weights, after dropout, and saves what there is to save.
  template <typename Weights>
  void weigh_all(const Weights& weights, int64_t r, A max, A gap) {
    int64_t support = 0;
    double total = 0;
    for (int64_t b = 0; b < few_.blocks; ++b) {
      A* z = few_.z(r, b);
      if (!((few_.block_max(r, b) - max) - gap > 0)) {
        std::fill_n(z, kKeyBlock, A(0));
        continue;
      }
      total += to_weights(weights, z, kKeyBlock, max, gap);
      const int64_t first = few_.keys_of(b).begin;
      for (int64_t i = 0; i < kKeyBlock; ++i) {
        if (z[i] > 0) tiles_.set(first + i);
        support += z[i] > 0;
      }
      drop_block(r, b);
    }
    few_.row(r).total = total;
    Base::save_state(r, max, gap, kSupportOverflow, support);
  }

  void finish_softmax(int64_t r, Interval visible, A max) {
    double total = 0;
    for (int64_t b = 0; b < few_.blocks; ++b) {
      total += to_weights(Softmax<A>(), few_.z(r, b), kKeyBlock, max, A(0));
      drop_block(r, b);
    }
    few_.row(r).total = total;
    Base::save_softmax(r, visible, max, total);
  }

  void drop_block(int64_t r, int64_t b) {
    const int64_t first = few_.keys_of(b).begin;
    drop(head_.dropout, r, kKeyBlock, [first](int32_t e) { return first + e; }, few_.z(r, b));
  }

  const FewRows<A>& few_;
};

// few_values, of all rows of a group of heads.
template <typename T, typename A>
inline void add_few_values(const ForwardHead<T, A>& head, int64_t rows, const FewRows<A>& few, int64_t piece,
                           FewBuffers<A>& buffers) {
  for (int64_t r = 0; r < rows; ++r) {
    if (few.row(r).dense) std::fill_n(few.values(r, piece), head.value_dim, A(0));
  }
  for (int64_t b = few.first_block(piece); b < few.first_block(piece + 1); ++b) {
    const int64_t first = few.keys_of(b).begin;
    for (int64_t r = 0; r < rows; ++r) {  // from the second row on the block's values are in the cache
      if (!few.row(r).dense) continue;
      const A* weights = few.z(r, b);
      int64_t count = 0;  // a weight of 0 reads no value
      for (int64_t i = 0; i < kKeyBlock; ++i) {
        buffers.weights[count] = weights[i];
        buffers.index[count] = static_cast<int32_t>(first + i);
        count += weights[i] != 0;
      }
      if (count == 0) continue;
      weighted_sum(buffers.weights, buffers.index, count, head.value, head.value_dim, buffers.sum);
      add_scaled(A(1), buffers.sum, head.value_dim, few.values(r, piece));
    }
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace adasplash::cpu

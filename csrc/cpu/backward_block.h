// The backward over the support. With u = p^(2-alpha) on the support, dp = dO.v and delta = sum(u dp) / sum(u):
//   ds = u (dp - delta),  dq = scale sum_j ds k_j,  dk_j = scale sum_i ds q_i,  dv_j = sum_i p dO_i.
// A first pass over blocks of queries gives delta, dq and each row's part of dalpha, a second one over blocks of keys
// gives dk and dv: no atomics, every sum in an order of its own that no thread count changes. Rows with a list of their
// support cost what its length says; the others ("dense" rows) are rebuilt by matrix products over the tiles that hold
// weight.
#pragma once

#include "cpu/scores.h"
#include "cpu/threshold.h"

namespace adasplash::cpu {
inline namespace CPU_CAPABILITY {

template <typename A>
struct BackwardBuffers {
  BackwardBuffers(int64_t head_dim, int64_t value_dim, int64_t capacity, Arena& arena)
      : query(arena.take<A>(kQueryBlock * head_dim)),
        growth(arena.take<A>(kQueryBlock)),
        broken(arena.take<bool>(kQueryBlock)),
        grad_out(arena.take<A>(kQueryBlock * value_dim)),
        z(arena.take<A>(kQueryBlock * kBlockStride<A>)),
        dp(arena.take<A>(kQueryBlock * kBlockStride<A>)),
        columns(arena.take<A>(kKeyBlock * std::max(head_dim, value_dim))),
        list_z(arena.take<A>(capacity + kLanes<A>)),
        list_u(arena.take<A>(capacity + kLanes<A>)),
        list_dp(arena.take<A>(capacity + kLanes<A>)),
        u_dp_k(arena.take<A>(kQueryBlock * head_dim)),
        u_k(arena.take<A>(kQueryBlock * head_dim)),
        sums(arena.take<RowSums>(kQueryBlock)),
        dense(arena.take<int64_t>(kQueryBlock)),
        dk{arena.take<A>(kKeyBlock * head_dim), head_dim},
        dv{arena.take<A>(kKeyBlock * value_dim), value_dim} {}

  struct RowSums {
    A dp_shift = 0;                 // taken off dp
    double p = 0, u = 0, u_dp = 0;  // of p; of u; of u (dp - dp_shift)
    double psi = 0, psi_dp = 0;     // of u psi; of u psi (dp - dp_shift), for dalpha
  };
  A* query;                      // the block's rows in type A
  A* growth;                     // of queries (scores.h)
  bool* broken;                  // whether a row of grad_out is not finite
  A* grad_out;                   // the block's rows in type A
  A *z, *dp;                     // of the block of queries and one block of keys; then u or p, and ds
  A* columns;                    // the block of keys in type A
  A *list_z, *list_u, *list_dp;  // of one row's support
  A *u_dp_k, *u_k;               // sums of u (dp - dp_shift) k, and of u k, for each row
  RowSums* sums;
  int64_t* dense;  // the queries without a list, whose rows stand behind each other in what is above
  Rows<A> dk, dv;
};

// Learns the length of each row's list. False where a list is not of ascending visible keys, as one from elsewhere
// might. Softmax, whose lists are of all keys, goes without them.
template <typename T, typename A>
inline bool read_lists(const BackwardHead<T, A>& head, int64_t first, int64_t rows) {
  for (int64_t i = first; i < first + rows; ++i) {
    const Interval visible = head.visible(i);
    const int32_t* support = head.support + i * head.capacity;
    int32_t& count = head.row_terms[i].count;
    count = 0;
    if (visible.empty()) continue;
    if (head.alpha == 1 || head.capacity == 0 || support[0] == kSupportOverflow) {
      count = RowTerms<A>::kDense;
      continue;
    }
    int64_t least = visible.begin;
    while (count < head.capacity && support[count] != kEndOfSupport) {
      if (support[count] < least || support[count] >= visible.end) return false;
      least = support[count++] + 1;
    }
  }
  return true;
}

template <typename T, typename A, typename Weights>
class BackwardBlock {
 public:
  BackwardBlock(const BackwardHead<T, A>& head, int64_t first, const Weights& weights, BackwardBuffers<A>& buffers)
      : head_(head),
        first_(first),
        rows_(std::min(kQueryBlock, head.queries - first)),
        weights_(weights),
        buffers_(buffers),
        tiles_(head, first) {
    for (int64_t i = first_; i < first_ + rows_; ++i) {
      if (is_dense(i)) buffers_.dense[dense_count_++] = i;
    }
  }

  // delta and dq of the block's rows.
  void query_pass() {
    for (int64_t i = first_; i < first_ + rows_; ++i) {
      if (!is_dense(i)) list_query_pass(i);
    }
    if (dense_count_ > 0) dense_query_pass();
  }

  // Adds the block's part to dk and dv of the given keys.
  void key_pass(Interval keys) {
    for (int64_t i = first_; i < first_ + rows_; ++i) {
      if (!is_dense(i)) list_key_pass(i, keys);
    }
    if (dense_count_ > 0) dense_key_pass(keys);
  }

 private:
  bool is_dense(int64_t i) const { return head_.row_terms[i].count == RowTerms<A>::kDense; }

  // Rows with a list. -------------------------------------------------------------------------------------------------

  const A* query_row(int64_t i) { return in_type<A>(head_.query[i], head_.head_dim, buffers_.query); }
  const A* grad_out_row(int64_t i) { return in_type<A>(head_.grad_out[i], head_.value_dim, buffers_.grad_out); }

  // Where list_products leaves the row's query if it shrinks.
  A* shrunk_query() { return buffers_.query + head_.head_dim; }

  // z and dp of the support entries of one row, into the list buffers.
  void list_products(int64_t i, const A* query, const A* grad_out, const int32_t* support, int64_t count) {
    const A growth = head_.row_terms[i].growth;
    list_scores(head_, i, query, growth, shrunk_query(), support, count, buffers_.list_z);
    for (int64_t e = 0; e < count; ++e) {
      buffers_.list_dp[e] = dot(grad_out, head_.value[support[e]], head_.value_dim);
    }
    drop(head_.dropout, i, count, [&](int32_t e) { return support[e]; }, buffers_.list_dp);
    pad_z(buffers_.list_z, count, kLanes<A>);
  }

  double list_alpha_sum(const RowTerms<A>& terms) const {
    const AlphaFactorOf<A, Weights> psi(terms.max, terms.gap);
    double sum = 0;
    for_lanes<A>(terms.count, [&](int64_t e, int64_t lanes) {  // z and u are padded, dp is not
      const Vec<A> dp = load<A>(buffers_.list_dp + e, lanes);
      const Vec<A> weighted = Vec<A>::loadu(buffers_.list_u + e) * psi(Vec<A>::loadu(buffers_.list_z + e));
      sum += sum_lanes(weighted * (dp - Vec<A>(terms.delta)));
    });
    return sum;
  }

  void save_alpha_term(int64_t i, double sum) { head_.alpha_terms[i] = sum / (head_.rate() * head_.rate()); }

  void list_query_pass(int64_t i) {
    const int32_t* support = head_.support + i * head_.capacity;
    const int64_t count = head_.row_terms[i].count;
    if constexpr (!Weights::softmax) {  // whose rows without a key alone come here
      if (count > 0) weigh_list(i, support, count);
    }
    A* dq = buffers_.u_k;  // the list's u are ds by now
    weighted_sum(buffers_.list_u, support, count, head_.key, head_.head_dim, dq);
    if (count > 0 && grows(i)) scale_by(static_cast<A>(head_.scale), head_.head_dim, dq);
    convert_back(dq, head_.head_dim, head_.dq[i]);
  }

  // Where a query shrinks so that products with it fit, ds times a scale as small might not.
  bool grows(int64_t i) const { return head_.row_terms[i].growth != 1; }

  // The terms of a row from its list, and ds of each key in it, times the scale if the query does not shrink.
  void weigh_list(int64_t i, const int32_t* support, int64_t count) {
    RowTerms<A>& terms = head_.row_terms[i];
    A* z = buffers_.list_z;
    A* u = buffers_.list_u;
    const A* dp = buffers_.list_dp;
    const A* query = query_row(i);
    terms.growth = growth_of(query, head_.head_dim);
    list_products(i, query, grad_out_row(i), support, count);
    // Dot products round otherwise than the forward's matrix products. Settling the gap on these very z keeps the
    // weights summing to one, which matters where scores are large.
    terms.max = *std::max_element(z, z + count);
    terms.gap = solve(weights_, z, count, terms.max, head_.row_state[2 * i + 1]);
    double sum_p = 0, sum_u = 0, sum_u_dp = 0;
    for (int64_t e = 0; e < count; e += kLanes<A>) {
      const auto weighed = weigh(weights_, Vec<A>::loadu(z + e), terms.max, terms.gap);
      weighed.u.store(u + e);
      sum_p += sum_lanes(weighed.p);
    }
    for (int64_t e = 0; e < count; ++e) {
      sum_u += u[e];
      sum_u_dp += static_cast<double>(u[e]) * dp[e];
    }
    terms.normaliser = static_cast<A>(1 / sum_p);
    terms.delta = static_cast<A>(sum_u_dp / sum_u);
    if (head_.alpha_terms != nullptr) save_alpha_term(i, list_alpha_sum(terms));
    const A scale = grows(i) ? A(1) : static_cast<A>(head_.scale);
    for (int64_t e = 0; e < count; ++e) u[e] *= (dp[e] - terms.delta) * scale;
  }

  void list_key_pass(int64_t i, Interval keys) {
    const RowTerms<A>& terms = head_.row_terms[i];
    const int32_t* begin = head_.support + i * head_.capacity;
    const int32_t* end = begin + terms.count;
    begin = std::lower_bound(begin, end, keys.begin);
    end = std::lower_bound(begin, end, keys.end);
    if (begin == end) return;
    const A* query = query_row(i);
    const A* grad_out = grad_out_row(i);
    list_products(i, query, grad_out, begin, end - begin);
    for (int64_t e = 0; e < end - begin; e += kLanes<A>) {
      const auto [p, u] = weigh(weights_, Vec<A>::loadu(buffers_.list_z + e), terms.max, terms.gap);
      const Vec<A> ds = u * (Vec<A>::loadu(buffers_.list_dp + e) - Vec<A>(terms.delta));
      ds.store(buffers_.list_u + e);
      (p * Vec<A>(terms.normaliser)).store(buffers_.list_z + e);
    }
    drop(head_.dropout, i, end - begin, [&](int32_t e) { return begin[e]; }, buffers_.list_z);
    const A* factor = grows(i) ? shrunk_query() : query;
    const A scale = static_cast<A>(head_.scale * terms.growth);
    for (int64_t e = 0; e < end - begin; ++e) {
      const int64_t k = begin[e] - keys.begin;
      add_scaled(buffers_.list_u[e] * scale, factor, head_.head_dim, buffers_.dk[k]);
      if (buffers_.list_z[e] != 0) add_scaled(buffers_.list_z[e], grad_out, head_.value_dim, buffers_.dv[k]);
    }
  }

  // Rows without. -----------------------------------------------------------------------------------------------------

  void pack_dense_rows() {
    for (int64_t d = 0; d < dense_count_; ++d) {
      const int64_t i = buffers_.dense[d];
      convert(head_.query[i], head_.head_dim, buffers_.query + d * head_.head_dim);
      convert(head_.grad_out[i], head_.value_dim, buffers_.grad_out + d * head_.value_dim);
    }
  }

  // The packed queries as products with keys take them.
  Factors<A> dense_factors() {
    return factors_of(Rows<const A>{buffers_.query, head_.head_dim}, dense_count_, head_.head_dim, buffers_.query,
                      buffers_.growth);
  }

  // Calls f(keys) for the blocks of keys in which this block of queries has weight, with z and dp computed.
  template <typename F>
  void for_dense_blocks(Interval within, const Factors<A>& query, const F& f) {
    for_key_blocks(head_, first_, rows_, [&](Interval keys) {
      if (keys.begin >= within.end || keys.end <= within.begin || !tiles_.any(keys)) return;
      block_scores(
          head_, query, dense_count_, [&](int64_t d) { return buffers_.dense[d]; }, keys, buffers_.columns, buffers_.z);
      multiply(Rows<const A>{buffers_.grad_out, head_.value_dim}, dense_count_, A(1), head_.value, keys,
               head_.value_dim, buffers_.columns, buffers_.dp);
      f(keys);
    });
  }

  // Calls f(d, i, its visible keys, z and dp there) for every dense row i, the d-th of them, and zeroes both blocks
  // where it does not see.
  template <typename F>
  void for_dense_rows(Interval keys, const F& f) {
    for (int64_t d = 0; d < dense_count_; ++d) {
      const int64_t i = buffers_.dense[d];
      A* z = buffers_.z + d * kBlockStride<A>;
      A* dp = buffers_.dp + d * kBlockStride<A>;
      Interval visible = head_.visible(i).clip(keys.begin, keys.end);
      if (visible.empty()) visible = {keys.end, keys.end};
      const int64_t before = visible.begin - keys.begin;
      for (A* row : {z, dp}) {
        std::fill_n(row, before, A(0));
        std::fill(row + before + visible.size(), row + keys.size(), A(0));
      }
      if (visible.empty()) continue;
      drop(head_.dropout, i, visible.size(), [&](int32_t e) { return visible.begin + e; }, dp + before);
      f(d, i, visible, z + before, dp + before);
    }
  }

  // The weights of `lanes` keys of row i, at z; zeros behind them, which are no keys. All of a broken row are NaN.
  Weighed<A> weigh_dense(int64_t i, const A* z, int64_t lanes) const {
    const A max = head_.row_state[2 * i], gap = head_.row_state[2 * i + 1];
    Weighed<A> weighed{Vec<A>(kNaN<A>), Vec<A>(kNaN<A>)};
    if (!std::isnan(max)) weighed = weigh(weights_, load<A>(z, lanes), max, gap);
    if (lanes == kLanes<A>) return weighed;
    return {Vec<A>::set(Vec<A>(0), weighed.p, lanes), Vec<A>::set(Vec<A>(0), weighed.u, lanes)};
  }

  // dp less a number of the row, and 0 where u is: 0 * NaN must not reach sums of rows that give a key no weight.
  static Vec<A> shifted_dp(const Vec<A>& u, const A* dp, int64_t lanes, A shift) {
    return Vec<A>::blendv(load<A>(dp, lanes) - Vec<A>(shift), Vec<A>(0), u == Vec<A>(0));
  }

  // One pass: with any dp_shift of the row, dq / scale = sum(u (dp - dp_shift) k) - (delta - dp_shift) sum(u k). The
  // shift is the delta of the keys so far, so that little is left to cancel, whatever mean values and keys have.
  void dense_query_pass() {
    pack_dense_rows();
    const Factors<A> query = dense_factors();
    sum_keys(query, /*guarded=*/false);
    const int64_t dim = head_.head_dim;
    bool finite = true;
    for (int64_t d = 0; d < dense_count_; ++d) {
      if (std::isnan(head_.row_state[2 * buffers_.dense[d]])) continue;
      finite &= all_finite(buffers_.u_dp_k + d * dim, dim) && all_finite(buffers_.u_k + d * dim, dim);
    }
    if (!finite) sum_keys(query, /*guarded=*/true);
    for (int64_t d = 0; d < dense_count_; ++d) finish_dense_row(d, buffers_.dense[d]);
  }

  // The sums of the dense rows over keys. `guarded`, keys that are not finite reach only the rows that see them, which
  // are NaN by their weights.
  void sum_keys(const Factors<A>& query, bool guarded) {
    const int64_t dim = head_.head_dim;
    std::fill_n(buffers_.u_dp_k, dense_count_ * dim, A(0));
    std::fill_n(buffers_.u_k, dense_count_ * dim, A(0));
    std::fill_n(buffers_.sums, dense_count_, typename BackwardBuffers<A>::RowSums{});
    for_dense_blocks({0, head_.keys}, query, [&](Interval keys) {
      for_dense_rows(keys, [&](int64_t d, int64_t i, Interval visible, A* z, A* dp) {
        add_row_sums(d, i, visible.size(), z, dp);
      });
      const Rows<const A> k = guarded ? finite_rows(head_.key, keys, dim, buffers_.columns, [](int64_t, const A*) {})
                                      : in_type<A>(head_.key, keys.begin, keys.size(), dim, buffers_.columns);
      Gemm<A>::nn(dense_count_, dim, keys.size(), A(1), buffers_.dp, kBlockStride<A>, k.data, k.stride, A(1),
                  buffers_.u_dp_k, dim);
      Gemm<A>::nn(dense_count_, dim, keys.size(), A(1), buffers_.z, kBlockStride<A>, k.data, k.stride, A(1),
                  buffers_.u_k, dim);
    });
  }

  // Adds n keys of row i, the d-th dense one, to its sums, and moves its dp_shift. Of these keys z becomes u, and dp
  // becomes u (dp - dp_shift).
  void add_row_sums(int64_t d, int64_t i, int64_t n, A* z, A* dp) {
    const int64_t dim = head_.head_dim;
    auto& sums = buffers_.sums[d];
    const AlphaFactorOf<A, Weights> psi_of(head_.row_state[2 * i], head_.row_state[2 * i + 1]);
    double p = 0, u = 0, u_dp = 0, psi = 0, psi_dp = 0;
    for_lanes<A>(n, [&](int64_t column, int64_t lanes) {
      const auto [own_p, own_u] = weigh_dense(i, z + column, lanes);
      p += sum_lanes(own_p);
      u += sum_lanes(own_u);
      const Vec<A> shifted = shifted_dp(own_u, dp + column, lanes, sums.dp_shift);
      u_dp += sum_lanes(own_u * shifted);
      if (head_.alpha_terms != nullptr) {
        // 0 where u is: of a score of -inf psi is infinite.
        const Vec<A> terms = own_u * psi_of(load<A>(z + column, lanes));
        const Vec<A> weighted = Vec<A>::blendv(terms, Vec<A>(0), own_u == Vec<A>(0));
        psi += sum_lanes(weighted);
        psi_dp += sum_lanes(weighted * shifted);
      }
      store(own_u, z + column, lanes);
    });
    if (u == 0) {
      std::fill_n(dp, n, A(0));
      return;
    }
    const A step = static_cast<A>((sums.u_dp + u_dp) / (sums.u + u));
    sums.dp_shift += step;
    add_scaled(-step, buffers_.u_k + d * dim, dim, buffers_.u_dp_k + d * dim);
    sums.u_dp -= step * sums.u;
    sums.psi += psi;
    sums.psi_dp += psi_dp - step * sums.psi;
    for_lanes<A>(n, [&](int64_t column, int64_t lanes) {
      const Vec<A> own_u = load<A>(z + column, lanes);
      const Vec<A> weighted = own_u * shifted_dp(own_u, dp + column, lanes, sums.dp_shift);
      store(weighted, dp + column, lanes);
      sums.u_dp += sum_lanes(load<A>(dp + column, lanes));
    });
    sums.p += p;
    sums.u += u;
  }

  // What its sums make of row i, the d-th dense one: row terms, its part of dalpha, and dq.
  void finish_dense_row(int64_t d, int64_t i) {
    const int64_t dim = head_.head_dim;
    const auto& sums = buffers_.sums[d];
    const A rest = static_cast<A>(sums.u_dp / sums.u);
    head_.row_terms[i].delta = sums.dp_shift + rest;
    head_.row_terms[i].normaliser = static_cast<A>(1 / sums.p);
    if (head_.alpha_terms != nullptr) save_alpha_term(i, sums.psi_dp - rest * sums.psi);
    A* dq = buffers_.u_dp_k + d * dim;
    add_scaled(-rest, buffers_.u_k + d * dim, dim, dq);
    for (int64_t column = 0; column < dim; ++column) dq[column] *= static_cast<A>(head_.scale);
    convert_back(dq, dim, head_.dq[i]);
  }

  void dense_key_pass(Interval keys) {
    pack_dense_rows();
    clear_broken_rows();
    const Factors<A> query = dense_factors();
    for_dense_blocks(keys, query, [&](Interval seen) {
      const int64_t offset = seen.begin - keys.begin;
      for_dense_rows(seen, [&](int64_t d, int64_t i, Interval visible, A* z, A* dp) {
        const RowTerms<A>& terms = head_.row_terms[i];
        const A shift = buffers_.broken[d] ? kNaN<A> : terms.delta;
        for_lanes<A>(visible.size(), [&](int64_t column, int64_t lanes) {
          const auto [p, u] = weigh_dense(i, z + column, lanes);
          store(p * Vec<A>(terms.normaliser), z + column, lanes);
          store(u * shifted_dp(u, dp + column, lanes, shift), dp + column, lanes);
        });
        drop(head_.dropout, i, visible.size(), [&](int32_t e) { return visible.begin + e; }, z);
        if (buffers_.broken[d]) add_broken_row(i, visible, z, buffers_.dv, visible.begin - keys.begin);
        if (query.growth != nullptr) scale_by(static_cast<A>(query.growth[d] * head_.scale), visible.size(), dp);
      });
      const A scale = query.growth == nullptr ? static_cast<A>(head_.scale) : A(1);
      Gemm<A>::tn(seen.size(), head_.head_dim, dense_count_, scale, buffers_.dp, kBlockStride<A>, query.rows.data,
                  query.rows.stride, A(1), buffers_.dk[offset], buffers_.dk.stride);
      Gemm<A>::tn(seen.size(), head_.value_dim, dense_count_, A(1), buffers_.z, kBlockStride<A>, buffers_.grad_out,
                  head_.value_dim, A(1), buffers_.dv[offset], buffers_.dv.stride);
    });
  }

  // Rows of queries and of dO that are not finite would reach all keys of a block, by 0 * NaN. A query's row is NaN by
  // its weights, whatever stands here; that of dO is added by `add_broken_row`.
  void clear_broken_rows() {
    for (int64_t d = 0; d < dense_count_; ++d) {
      A* query = buffers_.query + d * head_.head_dim;
      A* grad_out = buffers_.grad_out + d * head_.value_dim;
      if (!all_finite(query, head_.head_dim)) std::fill_n(query, head_.head_dim, A(0));
      buffers_.broken[d] = !all_finite(grad_out, head_.value_dim);
      if (buffers_.broken[d]) std::fill_n(grad_out, head_.value_dim, A(0));
    }
  }

  // Adds dO of row i to dv of the visible keys that it gives weight, from the offset-th row on.
  void add_broken_row(int64_t i, Interval visible, const A* weights, Rows<A> dv, int64_t offset) {
    const T* row = head_.grad_out[i];
    for (int64_t e = 0; e < visible.size(); ++e) {
      if (weights[e] > 0) add_scaled(weights[e], row, head_.value_dim, dv[offset + e]);
    }
  }

  const BackwardHead<T, A>& head_;
  const int64_t first_, rows_;
  const Weights& weights_;
  BackwardBuffers<A>& buffers_;
  TileBits tiles_;
  int64_t dense_count_ = 0;
};

}  // namespace CPU_CAPABILITY
}  // namespace adasplash::cpu

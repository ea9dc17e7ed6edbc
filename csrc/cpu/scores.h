// The z of queries and keys: of a block by one matrix product, of a list of keys by dot products.
#pragma once

#include "cpu/blocks.h"

namespace adasplash::cpu {
inline namespace CPU_CAPABILITY {

// q.k may overflow where z = z_scale * q.k does not, so a query with a component above this is multiplied by a power of
// two first, and its products by the inverse, its growth: that changes no bit of them, unless components are so much
// smaller than the largest that they become denormal (docs/contract.md).
template <typename A>
constexpr A kLargestFactor = 1 << 20;

// The growth of a query. One that is not finite has scores that are not, whatever it is multiplied by.
template <typename A>
inline A growth_of(const A* query, int64_t n) {
  Vec<A> largest(0);
  for_lanes<A>(n,
               [&](int64_t i, int64_t lanes) { largest = at::vec::maximum(largest, load<A>(query + i, lanes).abs()); });
  const A most = max_lanes(largest);
  if (!(most > kLargestFactor<A>) || std::isinf(most)) return 1;
  return std::ldexp(A(1), std::ilogb(most) - std::ilogb(kLargestFactor<A>));
}

// Rows of query as they are multiplied by keys.
template <typename A>
struct Factors {
  Rows<const A> rows;
  const A* growth = nullptr;  // of each row; null where it is 1 for all
};

// The rows themselves; or, where one has to shrink, all of them in `copy`, which they may be in already.
template <typename A>
inline Factors<A> factors_of(Rows<const A> query, int64_t rows, int64_t n, A* copy, A* growth) {
  bool grows = false;
  for (int64_t r = 0; r < rows; ++r) {
    growth[r] = growth_of(query[r], n);
    grows |= growth[r] != 1;
  }
  if (!grows) return {query};
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < n; ++i) copy[r * n + i] = query[r][i] / growth[r];
  }
  return {{copy, n}, growth};
}

// From z_scale * q.k of one query and n keys to z, in place: the only place that changes scores once the product is
// there. distance(e) is how far behind the query's place the e-th key stands, in type A; negative before it.
template <typename T, typename A, typename Distance>
inline void change_scores(const Head<T, A>& head, int64_t n, const Distance& distance, A* z) {
  if (head.slope == 0) return;
  const A slope = head.z_slope();
  const auto count = static_cast<int32_t>(n);
  for (int32_t e = 0; e < count; ++e) z[e] -= slope * std::abs(distance(e));
}

// The z of rows of query with a block of keys; query_of(r) says which query row r is.
template <typename T, typename A, typename F>
inline void block_scores(const Head<T, A>& head, const Factors<A>& query, int64_t rows, const F& query_of,
                         Interval keys, A* converted, A* block) {
  multiply(query.rows, rows, head.z_scale(), head.key, keys, head.head_dim, converted, block);
  for (int64_t r = 0; r < rows; ++r) {
    A* z = block + r * kBlockStride<A>;
    if (query.growth != nullptr) scale_by(query.growth[r], keys.size(), z);
    const A first = static_cast<A>(keys.begin - head.place(query_of(r)));
    change_scores(head, keys.size(), [first](int32_t e) { return first + static_cast<A>(e); }, z);
  }
}

// The z of query i with each of a list of keys. Its row is given in type A; where it grows, `copy` has room for
// another.
template <typename T, typename A>
inline void list_scores(const Head<T, A>& head, int64_t i, const A* query, A growth, A* copy, const int32_t* keys,
                        int64_t count, A* z) {
  if (growth != 1) {
    for (int64_t c = 0; c < head.head_dim; ++c) copy[c] = query[c] / growth;
    query = copy;
  }
  for (int64_t e = 0; e < count; ++e) z[e] = head.z_scale() * dot(query, head.key[keys[e]], head.head_dim);
  scale_by(growth, count, z);
  const int64_t place = head.place(i);
  change_scores(head, count, [&](int32_t e) { return static_cast<A>(keys[e] - place); }, z);
}

}  // namespace CPU_CAPABILITY
}  // namespace adasplash::cpu

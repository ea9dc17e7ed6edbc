// The z of queries and keys: of a block by one matrix product, of a list of keys by dot products.
#pragma once

#include "cpu/blocks.h"

namespace adasplash::cpu {
inline namespace CPU_CAPABILITY {

// From z_scale * q.k of one query and n keys to z, in place: the only place that changes scores once the product is
// there. distance(e) is how far behind the query's place the e-th key stands, in type A; negative before it.
template <typename T, typename A, typename Distance>
inline void change_scores(const Head<T, A>& head, int64_t n, const Distance& distance, A* z) {
  if (head.slope == 0) return;
  const A slope = head.z_slope();
  const auto count = static_cast<int32_t>(n);
  for (int32_t e = 0; e < count; ++e) z[e] -= slope * std::abs(distance(e));
}

// The z of rows of query, given in type A, with a block of keys; query_of(r) says which query row r is.
template <typename T, typename A, typename F>
inline void block_scores(const Head<T, A>& head, Rows<const A> query, int64_t rows, const F& query_of, Interval keys,
                         A* converted, A* block) {
  multiply(query, rows, head.z_scale(), head.key, keys, head.head_dim, converted, block);
  for (int64_t r = 0; r < rows; ++r) {
    const A first = static_cast<A>(keys.begin - head.place(query_of(r)));
    change_scores(
        head, keys.size(), [first](int32_t e) { return first + static_cast<A>(e); }, block + r * kBlockStride<A>);
  }
}

// The z of query i, whose row is given in type A, with each of a list of keys.
template <typename T, typename A>
inline void list_scores(const Head<T, A>& head, int64_t i, const A* query, const int32_t* keys, int64_t count, A* z) {
  for (int64_t e = 0; e < count; ++e) z[e] = head.z_scale() * dot(query, head.key[keys[e]], head.head_dim);
  const int64_t place = head.place(i);
  change_scores(head, count, [&](int32_t e) { return static_cast<A>(keys[e] - place); }, z);
}

}  // namespace CPU_CAPABILITY
}  // namespace adasplash::cpu

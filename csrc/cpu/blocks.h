// What forward and backward share: products of a block of queries with a block of keys, and the tile bits.
#pragma once

#include "cpu/blas.h"
#include "cpu/vector.h"
#include "ops/attention.h"

namespace adasplash::cpu {
inline namespace CPU_CAPABILITY {

// Calls f(keys) for the blocks of keys that the queries [first, first + rows) see, on a fixed grid.
template <typename T, typename A, typename F>
inline void for_key_blocks(const Head<T, A>& head, int64_t first, int64_t rows, const F& f) {
  const Interval all = head.visible(first, first + rows - 1);
  if (all.empty()) return;
  for (int64_t begin = all.begin / kKeyBlock * kKeyBlock; begin < all.end; begin += kKeyBlock) {
    f(all.clip(begin, begin + kKeyBlock));
  }
}

// From row to row of a block of z or of dp, row-major; wide enough for the padding that scans ask for.
template <typename A>
constexpr int64_t kBlockStride = kKeyBlock + 4 * kLanes<A>;

// block (rows x keys) = scale * left right^T, where right are the given rows of key or value.
template <typename A, typename T>
inline void multiply(Rows<const A> left, int64_t rows, A scale, KeyRows<const T> right, Interval keys, int64_t dim,
                     A* converted, A* block) {
  const Rows<const A> columns = in_type<A>(right, keys.begin, keys.size(), dim, converted);
  // BLAS does not look at its operands where the scale is zero, but NaN must come through.
  Gemm<A>::nt(rows, keys.size(), dim, scale == 0 ? A(1) : scale, left.data, left.stride, columns.data, columns.stride,
              A(0), block, kBlockStride<A>);
  for (int64_t r = 0; scale == 0 && r < rows; ++r) {
    for (int64_t i = 0; i < keys.size(); ++i) block[r * kBlockStride<A> + i] *= scale;
  }
}

// Rows of key or value in type A, with zeros in the place of those that are not finite: 0 * NaN must not reach sums of
// rows that give them no weight. Calls broken(e, row) for each of these. `converted` has room for the rows.
template <typename A, typename T, typename F>
inline Rows<const A> finite_rows(KeyRows<const T> rows, Interval keys, int64_t n, A* converted, const F& broken) {
  for (int64_t e = 0; e < keys.size(); ++e) {
    A* row = converted + e * n;
    convert(rows[keys.begin + e], n, row);
    if (all_finite(row, n)) continue;
    broken(e, row);
    std::fill_n(row, n, A(0));
  }
  return {converted, n};
}

// Multiplies what is there for n keys of query i by what dropout does to their weights; key_of(e) is the e-th key.
template <typename A, typename F>
inline void drop(const Dropout& dropout, int64_t i, int64_t n, const F& key_of, A* x) {
  if (!dropout.given()) return;
  const RowDropout row = dropout.of_row(i);
  const A kept = static_cast<A>(dropout.kept);
  const auto count = static_cast<int32_t>(n);
  for (int32_t e = 0; e < count; ++e) x[e] = row.drops(key_of(e)) ? A(0) : x[e] * kept;
}

// The tile bits of one row of 64 x 64 tiles; none are kept in inference.
class TileBits {
 public:
  template <typename T, typename A>
  TileBits(const Head<T, A>& head, int64_t first_query)
      : words_(head.tiles == nullptr ? nullptr : head.tiles + first_query / kTile * head.tile_words) {
    static_assert(kQueryBlock == kTile, "a block of queries must have tile bits of its own");
  }

  void set(int64_t key) {
    if (words_ != nullptr) words_[key / kTile / 32] |= int32_t(uint32_t{1} << (key / kTile % 32));
  }
  void set(Interval keys) {
    for (int64_t key = keys.begin / kTile * kTile; key < keys.end; key += kTile) set(key);
  }
  bool any(Interval keys) const {
    for (int64_t tile = keys.begin / kTile; tile * kTile < keys.end; ++tile) {
      if (static_cast<uint32_t>(words_[tile / 32]) >> (tile % 32) & 1) return true;
    }
    return false;
  }

 private:
  int32_t* words_;
};

}  // namespace CPU_CAPABILITY
}  // namespace adasplash::cpu

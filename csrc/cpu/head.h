// One head of one sequence, as the CPU kernels see it: plain pointers and extents, no torch type.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/dropout.h"

namespace adasplash::cpu {

// Half-open range of keys.
struct Interval {
  int64_t begin, end;

  ADASPLASH_INLINE bool empty() const { return begin >= end; }
  ADASPLASH_INLINE int64_t size() const { return end - begin; }
  ADASPLASH_INLINE Interval clip(int64_t from, int64_t to) const { return {std::max(begin, from), std::min(end, to)}; }
};

// A matrix whose rows are dense; `stride` is from one row to the next, in elements.
template <typename T>
struct Rows {
  T* data = nullptr;
  int64_t stride = 0;

  ADASPLASH_INLINE T* operator[](int64_t row) const { return data + row * stride; }
};

// Keys or values of one head of a sequence, which lie behind each other or in pages: `pages` names the page of every
// `page` rows, and is null where they are not in pages.
template <typename T>
struct KeyRows {
  T* data = nullptr;
  int64_t stride = 0;
  const int64_t* pages = nullptr;
  int64_t page = 0, page_stride = 0;

  ADASPLASH_INLINE T* operator[](int64_t row) const {
    if (pages == nullptr) return data + row * stride;
    return data + pages[row / page] * page_stride + row % page * stride;
  }
  // Whether rows [first, first + count), one or more, are `stride` apart.
  ADASPLASH_INLINE bool evenly_spaced(int64_t first, int64_t count) const {
    return pages == nullptr || first / page == (first + count - 1) / page;
  }
};

// A window bound that never binds, small enough that adding positions does not overflow. That of the GPU kernels
// (cuda/embedded.h) is another number, as their positions are 32 bits wide.
constexpr int64_t kUnlimited = INT64_MAX / 4;

// What both passes know of a head. T is the tensors' type, A the type of scores, thresholds and sums.
template <typename T, typename A>
struct Head {
  Rows<const T> query;
  KeyRows<const T> key, value;
  int64_t queries, keys, head_dim, value_dim;
  int64_t first_place;  // of query 0, see `place`
  // How far a query sees from its own place; is_causal is folded in.
  int64_t window_left = kUnlimited, window_right = kUnlimited;
  double alpha, scale, slope = 0;  // slope: ALiBi's, zero without it
  Dropout dropout;

  // Saved by the forward. No lists where capacity is 0; nothing at all where row_state is null (inference).
  A* row_state = nullptr;      // (queries, 2): max and gap
  int32_t* support = nullptr;  // (queries, capacity)
  int32_t* tiles = nullptr;    // (ceil(queries / 64), tile_words)
  int64_t capacity = 0, tile_words = 0;

  // The key that a query stands beside, on the diagonal, if there is such a key: it may be before the first one, or
  // behind the last.
  ADASPLASH_INLINE int64_t place(int64_t query_index) const { return first_place + query_index; }

  // Which keys a query sees, and the other way round.
  ADASPLASH_INLINE Interval visible(int64_t query_index) const {
    return Interval{place(query_index) - window_left, place(query_index) + window_right + 1}.clip(0, keys);
  }
  // The keys that any query of a block sees.
  ADASPLASH_INLINE Interval visible(int64_t first_query, int64_t last_query) const {
    return {visible(first_query).begin, visible(last_query).end};
  }
  // The queries that see any of the keys.
  ADASPLASH_INLINE Interval watchers(Interval of) const {
    return Interval{of.begin - window_right - place(0), of.end + window_left - place(0)}.clip(0, queries);
  }

  // z = rate * score; for softmax, which alpha = 1 is, z is the score itself.
  ADASPLASH_INLINE double rate() const { return alpha == 1 ? 1 : alpha - 1; }
  // z = z_scale * q.k - z_slope * |place - key| (scores.h)
  ADASPLASH_INLINE A z_scale() const { return static_cast<A>(rate() * scale); }
  ADASPLASH_INLINE A z_slope() const { return static_cast<A>(rate() * slope); }
};

template <typename T, typename A>
struct ForwardHead : Head<T, A> {
  Rows<T> out;  // (queries, value_dim)
};

// What the first pass of the backward leaves for the second, for each row.
template <typename A>
struct RowTerms {
  static constexpr int32_t kDense = -1;  // as count: the row has no list

  A growth;       // of the row's products with keys (scores.h)
  A max, gap;     // of the row's list, as the backward computes its scores
  A normaliser;   // 1 / sum(p), one but for the rounding of the gap
  A delta;        // sum(u dp) / sum(u)
  int32_t count;  // entries in the row's list
};

template <typename T, typename A>
struct BackwardHead : Head<T, A> {
  Rows<const T> grad_out;
  Rows<T> dq;                        // (queries, head_dim)
  RowTerms<A>* row_terms = nullptr;  // (queries,)
  double* alpha_terms = nullptr;     // (queries,): each row's part of dalpha; null where nobody asks for it
};

template <typename T, typename A>
struct SummaryHead : Head<T, A> {
  int32_t* support_size = nullptr;  // (queries,)
  A* largest_weight = nullptr;      // (queries,)
};

// Tiles of keys in a row of tiles.
struct TileCounts {
  int64_t visible = 0, weighing = 0;
};

// Block shapes. They never depend on threads or on other heads and sequences, as BLAS bits depend on the block's shape;
// in the forward not on data either, so that a NaN changes no bit of other rows.
constexpr int64_t kQueryBlock = 64;  // rows of one task, a multiple of the tile edge
constexpr int64_t kKeyBlock = 512;   // keys of one matrix product

}  // namespace adasplash::cpu

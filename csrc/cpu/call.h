// A call of attention as the CPU's ops see it: tensors and options, from which each head of each sequence is described.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "cpu/head.h"
#include "cpu/options.h"
#include "cpu/tasks.h"
#include "cpu/types.h"

namespace adasplash::cpu {

// The kernels read rows through BLAS: dense, not overlapping, with a stride that fits an int.
inline at::Tensor with_dense_rows(const at::Tensor& t) {
  const bool dense = (t.size(3) <= 1 || t.stride(3) == 1) &&
                     (t.size(2) <= 1 || (t.stride(2) >= t.size(3) && t.stride(2) <= INT32_MAX));
  return dense ? t : t.contiguous();
}

// Rows from `first` on of one head of a tensor (entries, heads, rows, width).
template <typename T>
Rows<T> rows_of(const at::Tensor& t, int64_t entry, int64_t h, int64_t first) {
  // A single row's stride may be anything; BLAS still wants one that a row fits in.
  const int64_t stride = t.size(2) <= 1 ? std::max<int64_t>(t.size(3), 1) : t.stride(2);
  const int64_t offset = entry * t.stride(0) + h * t.stride(1) + first * stride;
  if constexpr (std::is_const_v<T>) {
    return {t.const_data_ptr<std::remove_const_t<T>>() + offset, stride};
  } else {
    return {t.mutable_data_ptr<T>() + offset, stride};
  }
}

// The same of what keys and values are read from.
template <typename T>
KeyRows<const T> key_rows_of(const at::Tensor& t, int64_t entry, int64_t h, int64_t first) {
  const auto rows = rows_of<const T>(t, entry, h, first);
  return {rows.data, rows.stride};
}
// One head of a cache (pages, heads, rows, width), where the sequence has these pages.
template <typename T>
KeyRows<const T> paged_rows_of(const at::Tensor& cache, int64_t h, const int64_t* pages) {
  const auto rows = rows_of<const T>(cache, /*entry=*/0, h, /*first=*/0);
  return {rows.data, rows.stride, pages, cache.size(2), cache.stride(0)};
}

// One call's tensors and options, from which the description of each head is filled in.
template <typename T>
struct Call {
  using A = Accumulate<T>;

  Call(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const AttentionOptions& options,
       const SavedForBackward& saved)
      : sequences(sequences_of(q, k, options)),
        query(with_dense_rows(by_head(q, options.packed()))),
        key(with_dense_rows(by_head(k, options.packed_keys()))),
        value(with_dense_rows(by_head(v, options.packed_keys()))),
        heads(query.size(1)),
        kv_heads(key.size(1)),
        group(heads / std::max<int64_t>(kv_heads, 1)),
        options_(options),
        pages_(pages_of(sequences, key, options)),
        alphas_(alphas_of(heads, options)),
        slopes_(slopes_of(sequences.size(), heads, options)),
        dropout_(dropout_of(options)),
        dropout_origins_(dropout_origins_of(sequences.size(), options)),
        training_(saved.row_state.dim() > 1),
        row_state_(saved.row_state.contiguous()),
        support_(saved.support.contiguous()),
        tiles_(saved.tiles.contiguous()) {}

  // Causal heads have their longest blocks of queries last; those go first.
  Blocks query_blocks() const { return query_blocks(sequences); }
  Blocks query_blocks(const std::vector<Sequence>& of) const {
    return {of, &Sequence::queries, heads, kQueryBlock, /*last_first=*/true};
  }
  Blocks key_blocks() const { return {sequences, &Sequence::keys, kv_heads, kKeyBlock, /*last_first=*/false}; }

  int64_t rows() const { return query.size(0) * heads * query.size(2); }
  // Where a head's rows start in what has the rows of all of them, head by head.
  int64_t first_row(const Sequence& s, int64_t h) const {
    return (s.entry * heads + h) * query.size(2) + s.first_query;
  }

  void describe(size_t sequence, int64_t h, Head<T, A>& head) const {
    const Sequence& s = sequences[sequence];
    head.query = rows_of<const T>(query, s.entry, h, s.first_query);
    if (options_.paged()) {
      const int64_t* const pages = pages_.data() + sequence * options_.block_table->size(1);
      head.key = paged_rows_of<T>(key, h / group, pages);
      head.value = paged_rows_of<T>(value, h / group, pages);
    } else {
      head.key = key_rows_of<T>(key, s.entry, h / group, s.first_key);
      head.value = key_rows_of<T>(value, s.entry, h / group, s.first_key);
    }
    head.queries = s.queries;
    head.keys = s.keys;
    head.first_place = s.first_place;
    head.head_dim = query.size(3);
    head.value_dim = value.size(3);
    const int64_t left = options_.window[0], right = options_.window_right();
    if (left >= 0) head.window_left = std::min(left, kUnlimited);
    if (right >= 0) head.window_right = std::min(right, kUnlimited);
    head.alpha = alphas_[h];
    head.scale = options_.scale.value_or(1 / std::sqrt(static_cast<double>(head.head_dim)));
    if (!slopes_.empty()) head.slope = slopes_[sequence * heads + h];
    head.dropout = dropout_;
    const int64_t* const origin = dropout_origins_.data() + sequence * 4;
    head.dropout.entry = static_cast<uint32_t>(origin[0]);
    head.dropout.head = static_cast<uint32_t>(origin[1] + h);
    head.dropout.first_query = static_cast<uint32_t>(origin[2]);
    head.dropout.first_key = static_cast<uint32_t>(origin[3]);
    if (training_) {
      head.capacity = support_.size(-1);
      head.tile_words = tiles_.size(-1);
      head.row_state = row_state_.mutable_data_ptr<A>() + first_row(s, h) * 2;
      head.support = support_.mutable_data_ptr<int32_t>() + first_row(s, h) * head.capacity;
      head.tiles = tiles_.mutable_data_ptr<int32_t>() +
                   ((s.entry * heads + h) * tiles_.size(-2) + s.first_tile_row) * head.tile_words;
    }
  }

  const std::vector<Sequence> sequences;
  const at::Tensor query, key, value;
  const int64_t heads, kv_heads, group;

 private:
  const AttentionOptions& options_;
  const std::vector<int64_t> pages_;
  const std::vector<double> alphas_, slopes_;
  const Dropout dropout_;
  const std::vector<int64_t> dropout_origins_;
  const bool training_;
  const at::Tensor row_state_, support_, tiles_;
};

}  // namespace adasplash::cpu

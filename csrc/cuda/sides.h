// How the sequences of a call are stored, which scratch is laid out by.
#pragma once

#include <algorithm>

#include "cuda/implementation.h"

namespace adasplash::cuda {

// One side, queries or keys. Keys in a paged cache are as padded ones here, with as much room for each sequence as a
// row of the block table has, whichever form queries have.
struct StoredSide {
  static StoredSide of_queries(const AttentionInputs& inputs) {
    const AttentionShape shape = shape_of(inputs);
    return of(inputs.options.packed(), shape.queries, inputs.options.max_seqlen_q, shape.batch);
  }
  static StoredSide of_keys(const AttentionInputs& inputs) {
    const AttentionShape shape = shape_of(inputs);
    return of(inputs.options.packed_keys(), shape.keys, inputs.options.max_seqlen_k, shape.batch);
  }

  bool packed;         // the sequences share one dimension of rows
  int64_t rows;        // of a sequence, or of all packed ones
  int64_t max_seqlen;  // the most rows that one sequence has
  int64_t tile_rows;   // that a head has for all `rows`

 private:
  static AttentionShape shape_of(const AttentionInputs& inputs) {
    return AttentionShape::of(inputs.query, inputs.key, inputs.value, inputs.options);
  }
  static StoredSide of(bool packed, const c10::SymInt& rows, const c10::SymInt& max_seqlen, const c10::SymInt& batch) {
    const int64_t count = rows.expect_int();
    return {.packed = packed,
            .rows = count,
            .max_seqlen = packed ? std::min(max_seqlen.expect_int(), count) : count,
            .tile_rows = tile_row_count(rows, batch, packed).expect_int()};
  }
};

// The most keys that so many neighbouring queries of a sequence may see between them, of so many keys.
inline int64_t most_visible(const AttentionOptions& options, int64_t keys, int64_t queries) {
  const int64_t left = options.window[0], right = options.window_right();
  return left < 0 || right < 0 || left >= keys || right >= keys ? keys : std::min(keys, left + queries + right);
}
inline int64_t most_visible(const AttentionInputs& inputs, int64_t queries) {
  return most_visible(inputs.options, StoredSide::of_keys(inputs).max_seqlen, queries);
}

}  // namespace adasplash::cuda

// Which heads a launch is for: all, unless its scratch would be too large, which grows with queries times keys.
#pragma once

#include <vector>

#include "ops/attention.h"

namespace adasplash::cuda {

// Numbers of 32 bits that the kernels of a part need for each pair of a query tile and a key tile, and for each tile of
// the longer side.
struct Scratch {
  int64_t of_pair, of_tile_row;
};

class Part {
 public:
  // The parts of a call, which together cover its heads. The scratch of each stays below a limit, if that of a single
  // key head does.
  static std::vector<Part> all(const at::Tensor& query, const at::Tensor& key, const AttentionOptions& options,
                               const Scratch& scratch);

  // The part of a tensor with the dimensions of query, of key, or of row_state, whose heads come before the rows.
  at::Tensor queries(const at::Tensor& t) const { return narrowed(t, 1, group_); }
  at::Tensor keys(const at::Tensor& t) const { return narrowed(t, 1, 1); }
  at::Tensor rows(const at::Tensor& t) const { return narrowed(t, packed_ ? 0 : 1, group_); }
  AttentionOptions options(const AttentionOptions& whole) const;

 private:
  at::Tensor narrowed(const at::Tensor& t, int64_t head_dimension, int64_t heads_a_key_head) const;

  bool whole_ = true, packed_ = false;
  int64_t first_entry_ = 0, entries_ = 0;  // of the batch; unused if packed
  int64_t first_key_head_ = 0, key_heads_ = 0, group_ = 1;
};

}  // namespace adasplash::cuda

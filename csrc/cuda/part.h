// Which heads are computed at a time: all, unless their scratch would be too large, which grows with queries times
// keys.
#pragma once

#include <vector>

#include "cuda/implementation.h"

namespace adasplash::cuda {

class Part {
 public:
  // The parts of a call, which together cover its heads. The scratch of each stays below a limit, if that of a single
  // key head does.
  static std::vector<Part> all(const AttentionInputs& inputs, const Scratch& scratch);

  // The part of a tensor with the dimensions of query or of key, or of row_state, where heads come before rows in the
  // packed form too.
  at::Tensor queries(const at::Tensor& t) const { return narrowed(t, !packed_, 1, group_); }
  at::Tensor keys(const at::Tensor& t) const { return narrowed(t, keys_by_entry_, 1, 1); }
  at::Tensor rows(const at::Tensor& t) const { return narrowed(t, !packed_, packed_ ? 0 : 1, group_); }
  AttentionOptions options(const AttentionOptions& whole) const;
  FirstHead first() const { return {first_entry_, first_kv_head_ * group_}; }

 private:
  at::Tensor narrowed(const at::Tensor& t, bool by_entry, int64_t head_dimension, int64_t heads_a_kv_head) const;

  bool whole_ = true, packed_ = false;
  bool keys_by_entry_ = true;              // not in a paged cache, whose pages belong to no entry of the batch
  int64_t first_entry_ = 0, entries_ = 0;  // of the batch; unused if packed
  int64_t first_kv_head_ = 0, kv_heads_ = 0, group_ = 1;
};

}  // namespace adasplash::cuda

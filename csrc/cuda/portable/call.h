// What forward and backward share: a call's tensors and options in the terms of the kernels.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>

#include "cuda/launchers.h"
#include "ops/attention.h"

namespace adasplash::cuda {

Rows rows_of(const at::Tensor& t);
MutableRows mutable_rows_of(const at::Tensor& t);

// The tensor itself if its rows are dense and start where the kernels need them to, else a copy. Rows of a copy may be
// longer, with zeros at their ends.
at::Tensor with_aligned_rows(const at::Tensor& t);

// Where a kernel writes a result: the result itself, or rows like those above, from which `finish` copies it.
class Result {
 public:
  explicit Result(const at::Tensor& result);
  void finish() const;
  const at::Tensor rows;

 private:
  const at::Tensor result_;
};

// One call of an op. While it lives its device is the current one.
class Call {
 public:
  Call(const char* op, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
       const AttentionOptions& options);

  const Variant& variant(Kernel kernel, bool marked = false) const;
  int64_t query_programs(const Variant& v) const {
    return (arguments.limit_q.value + v.block_m - 1) / v.block_m * heads;
  }
  int64_t key_programs(const Variant& v) const {
    return (arguments.limit_k.value + v.block_n - 1) / v.block_n * kv_heads;
  }

  // Of all heads: rows of tiles; pairs of a query tile and a key tile, laid out by query tiles or by key tiles; rows of
  // row_state; words of tile bits.
  int64_t query_tile_rows() const;
  int64_t key_tile_rows() const;
  int64_t query_tile_pairs() const;
  int64_t key_tile_pairs() const;
  int64_t state_rows() const;
  int64_t tile_words() const;
  at::Tensor empty_ints(int64_t count) const;

 private:
  int64_t stored_heads() const;  // of row_state and tile bits, which the sequences of a packed batch share

  c10::DeviceGuard guard_;
  // What the kernels are given as int32 and float32, kept alive.
  const at::Tensor lengths_q_, lengths_k_, alphas_, slopes_;

 public:
  const bool packed;
  const at::Tensor query, key, value;  // query negated for a negative scale, so that q.k orders keys as scores do
  const Place place;
  const int64_t heads, kv_heads;  // of the whole batch
  const CallArguments arguments;
};

}  // namespace adasplash::cuda

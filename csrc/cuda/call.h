// What forward and backward share: a call's tensors and options in the terms of the kernels.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>

#include <initializer_list>

#include "attention.h"
#include "cuda/launchers.h"

namespace adasplash::cuda {

Rows rows_of(const at::Tensor& t);
MutableRows mutable_rows_of(const at::Tensor& t);

// The tensor itself if its rows are dense, as the kernels need them, else a copy.
at::Tensor with_dense_rows(const at::Tensor& t);

// One call of an op. While it lives its device is the current one.
class Call {
 public:
  Call(const char* op, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
       const AttentionOptions& options);

  // The kernel for this call, given the tensors besides query, key and value whose rows it reads or writes. `gradient`:
  // the one that also finds the gradient of alpha, if alpha is a tensor.
  const Variant& variant(Kernel kernel, std::initializer_list<at::Tensor> more, bool gradient = false) const;
  int64_t query_programs(const Variant& v) const { return (shape.limit_q.value + v.block_m - 1) / v.block_m * heads; }
  int64_t key_programs(const Variant& v) const { return (shape.limit_k.value + v.block_n - 1) / v.block_n * kv_heads; }

  // One number for every pair of a query tile and a key tile: laid out by query tiles, or by key tiles.
  at::Tensor empty_by_query_tile(at::ScalarType type) const;
  at::Tensor empty_by_key_tile(at::ScalarType type) const;

 private:
  c10::DeviceGuard guard_;
  // What the kernels are given as int32 and float32, kept alive.
  const at::Tensor lengths_q_, lengths_k_, alphas_, slopes_;
  const bool packed_, general_;  // general: needs the code for any alpha, which is also that for the other options

 public:
  const at::Tensor query, key, value;
  const Place place;
  const int64_t heads, kv_heads;  // of the whole batch
  const int64_t queries;          // rows of row_state
  const Exactly<const int32_t*> lengths_q, lengths_k;
  const Exactly<const float*> alphas, slopes;
  const Exactly<int64_t> slopes_batch, state_batch;  // from one batch entry to the next
  const Shape shape;
};

}  // namespace adasplash::cuda

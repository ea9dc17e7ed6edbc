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

// Throws NotImplementedError for the options that the CUDA kernels do not have yet, naming the option.
void check_available(const char* op, const AttentionOptions& options);

// One call of an op. While it lives its device is the current one.
class Call {
 public:
  Call(const char* op, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
       const AttentionOptions& options);

  // The kernel for this call, given the tensors besides query, key and value whose rows it reads or writes.
  const Variant& variant(Kernel kernel, std::initializer_list<at::Tensor> more) const;
  int64_t query_programs(const Variant& v) const { return (shape.limit_q.value + v.block_m - 1) / v.block_m * heads; }
  int64_t key_programs(const Variant& v) const { return (shape.limit_k.value + v.block_n - 1) / v.block_n * kv_heads; }

  // One number for every query tile and key tile: (B, H, ceil(M / 64), ceil(N / 64)).
  at::Tensor empty_per_tile(at::ScalarType type) const;

 private:
  c10::DeviceGuard guard_;

 public:
  const at::Tensor query, key, value;
  const Place place;
  const int64_t heads, kv_heads;  // of the whole batch
  const int64_t state_batch;      // rows of row_state between batch entries
  const Shape shape;

  // Lengths of sequences: none yet.
  static constexpr const int32_t* kNoLengths = nullptr;
};

}  // namespace adasplash::cuda

// A key index (ops/key_index.h) as the kernels take it.
#pragma once

#include <ATen/core/Tensor.h>

#include "cuda/implementation.h"
#include "cuda/launchers.h"

namespace adasplash::cuda {

// The index of a cache (blocks, page, H_kv, D), to be written.
MutableKeyIndex mutable_key_index(const char* op, const at::Tensor& key_index, const at::Tensor& key_cache);

// The index that a call is given, from the first page and key head of its part on.
KeyIndex key_index_of(const AttentionInputs& inputs);

}  // namespace adasplash::cuda

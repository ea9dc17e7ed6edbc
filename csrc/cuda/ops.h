// The CUDA kernels of the private ops, and of those on a paged cache.
#pragma once

#include "ops/activation.h"
#include "ops/attention.h"
#include "ops/cache.h"
#include "ops/summary.h"

namespace adasplash::cuda {

// Whether the CUDA kernels serve tensors on this device: CUDA devices, and in tests the CPU.
bool serves(c10::Device device);

// How many places of support a row of a call for training is to have: for what the forward keeps there, of these
// shapes.
c10::SymInt support_capacity(const at::Tensor& query, const at::Tensor& key, const AttentionOptions& options);

ForwardResult forward(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                      const AttentionOptions& options, const c10::SymInt& support_capacity);
BackwardResult backward(const at::Tensor& grad_out, const at::Tensor& query, const at::Tensor& key,
                        const at::Tensor& value, const SavedForBackward& saved, const AttentionOptions& options);
SummaryResult summarize(const at::Tensor& query, const at::Tensor& key, const SavedForBackward& saved,
                        const AttentionOptions& options);

// The kernel of entmax_attn_paged (ops/cache.h), entmax_cache_append and entmax_key_index_update.
void attend_cache(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                  const AttentionOptions& options, const at::Tensor& out);
void append_to_cache(const at::Tensor& key, const at::Tensor& value, const at::Tensor& key_cache,
                     const at::Tensor& value_cache, const at::Tensor& slots, const OptionalTensor& key_index);
void update_key_index(const at::Tensor& key_cache, const at::Tensor& slots, const at::Tensor& key_index);

at::Tensor activation(const at::Tensor& input, const ActivationAlpha& alpha);
ActivationGradients activation_backward(const at::Tensor& grad_out, const at::Tensor& output,
                                        const ActivationAlpha& alpha);

}  // namespace adasplash::cuda

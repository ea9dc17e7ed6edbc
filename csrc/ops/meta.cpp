// Meta kernels: shapes, types and strides without data, for fake tensors, torch.compile and torch.export.
#include <torch/library.h>

#include "ops/activation.h"
#include "ops/activation_checks.h"
#include "ops/attention.h"
#include "ops/attention_checks.h"
#include "ops/cache.h"
#include "ops/key_index.h"
#include "ops/summary.h"

namespace adasplash {
namespace {

ForwardResult forward(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                      const AttentionOptions& options, const c10::SymInt& support_capacity) {
  check_attention("_entmax_attn_forward", query, key, value, options);
  return allocate_forward(query, key, value, options, support_capacity);
}

BackwardResult backward(const at::Tensor& grad_out, const at::Tensor& query, const at::Tensor& key,
                        const at::Tensor& value, const SavedForBackward& saved, const AttentionOptions& options) {
  check_backward(grad_out, query, key, value, saved, options);
  return allocate_backward(query, key, value, options);
}

SummaryResult summary(const at::Tensor& query, const at::Tensor& key, const SavedForBackward& saved,
                      const AttentionOptions& options) {
  check_attention("_entmax_attn_summary", query, key, key, options);
  check_saved("_entmax_attn_summary", query, key, saved, options);
  return allocate_summary(query, key, saved, options);
}

at::Tensor paged(const at::Tensor& query, const at::Tensor& key_cache, const at::Tensor& value_cache,
                 const at::Tensor& block_table, const at::Tensor& kv_seqlens, const AttentionOptions& options) {
  return PagedCall::of(query, key_cache, value_cache, block_table, kv_seqlens, options).allocate();
}

at::Tensor activation(const at::Tensor& input, const ActivationAlpha& alpha) {
  check_activation("_entmax_forward", input, alpha);
  return allocate_activation(input);
}

ActivationGradients activation_backward(const at::Tensor& grad_out, const at::Tensor& output,
                                        const ActivationAlpha& alpha) {
  check_activation_backward(grad_out, output, alpha);
  return allocate_activation_gradients(output, alpha);
}

}  // namespace
}  // namespace adasplash

TORCH_LIBRARY_IMPL(adasplash, Meta, m) {
  using namespace adasplash;
  m.impl("_entmax_attn_forward", forward_op<forward>);
  m.impl("_entmax_attn_indexed", indexed_op<forward>);
  m.impl("_entmax_attn_backward", backward_op<backward>);
  m.impl("_entmax_attn_summary", summary_op<summary>);
  implement_paged<paged>(m);
  m.impl("entmax_cache_append", check_append);
  m.impl("entmax_make_key_index", allocate_key_index);
  m.impl("entmax_key_index_update", check_key_index_update);
  m.impl("_entmax_forward", activation_op<activation>);
  m.impl("_entmax_backward", activation_backward_op<activation_backward>);
}

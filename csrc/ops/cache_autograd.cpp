// The ops on a paged cache and its key index above the backends. They have no gradient, and say so; a change is
// counted, by which autograd finds that something it saved was overwritten.
#include <ATen/core/grad_mode.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/library.h>

#include <initializer_list>
#include <utility>

#include "adasplash.h"
#include "ops/cache.h"

namespace adasplash {
namespace {

void refuse_gradients(const char* op, std::initializer_list<std::pair<const char*, OptionalTensor>> arguments) {
  for (const auto& [name, tensor] : arguments) {
    if (!tensor || !tensor->defined()) continue;
    TORCH_CHECK(!at::GradMode::is_enabled() || !tensor->requires_grad(), op, " has no gradient, and ", name,
                " requires one: call it under torch.no_grad(), or detach ", name);
    TORCH_CHECK_NOT_IMPLEMENTED(!tensor->_fw_grad(/*level=*/0).defined(), op, " has no forward-mode AD");
  }
}

at::Tensor attend(const at::Tensor& query, const at::Tensor& key_cache, const at::Tensor& value_cache,
                  const at::Tensor& block_table, const at::Tensor& kv_seqlens, const AttentionOptions& options) {
  refuse_gradients("entmax_attn_paged", {{"query", query},
                                         {"key_cache", key_cache},
                                         {"value_cache", value_cache},
                                         {"alpha", options.head_alpha},
                                         {"alibi_slopes", options.alibi_slopes}});
  at::AutoDispatchBelowADInplaceOrView guard;
  return call_paged(query, key_cache, value_cache, block_table, kv_seqlens, options);
}

void append(const at::Tensor& key, const at::Tensor& value, const at::Tensor& key_cache, const at::Tensor& value_cache,
            const at::Tensor& slots, const OptionalTensor& key_index) {
  refuse_gradients("entmax_cache_append",
                   {{"key", key}, {"value", value}, {"key_cache", key_cache}, {"value_cache", value_cache}});
  at::AutoDispatchBelowAutograd guard;
  entmax_cache_append(key, value, key_cache, value_cache, slots, key_index);
}

void update(const at::Tensor& key_cache, const at::Tensor& slots, const at::Tensor& key_index) {
  refuse_gradients("entmax_key_index_update", {{"key_cache", key_cache}});
  at::AutoDispatchBelowAutograd guard;
  entmax_key_index_update(key_cache, slots, key_index);
}

// Calls an op that changes these tensors, and counts that.
template <typename F>
void change(const char* op, std::initializer_list<std::pair<const char*, OptionalTensor>> changed, const F& call) {
  for (const auto& [name, tensor] : changed) {
    TORCH_CHECK(!tensor || !tensor->is_inference() || c10::InferenceMode::is_enabled(), op, ": ", name,
                " was made in inference mode and can be changed there only");
  }
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    call();
  }
  for (const auto& [name, tensor] : changed) {
    if (tensor) torch::autograd::increment_version(*tensor);
  }
}

void append_and_count(const at::Tensor& key, const at::Tensor& value, const at::Tensor& key_cache,
                      const at::Tensor& value_cache, const at::Tensor& slots, const OptionalTensor& key_index) {
  change("entmax_cache_append", {{"key_cache", key_cache}, {"value_cache", value_cache}, {"key_index", key_index}},
         [&] { entmax_cache_append(key, value, key_cache, value_cache, slots, key_index); });
}

void update_and_count(const at::Tensor& key_cache, const at::Tensor& slots, const at::Tensor& key_index) {
  change("entmax_key_index_update", {{"key_index", key_index}},
         [&] { entmax_key_index_update(key_cache, slots, key_index); });
}

}  // namespace
}  // namespace adasplash

TORCH_LIBRARY_IMPL(adasplash, Autograd, m) {
  adasplash::implement_paged<adasplash::attend>(m);
  m.impl("entmax_cache_append", adasplash::append);
  m.impl("entmax_key_index_update", adasplash::update);
}

TORCH_LIBRARY_IMPL(adasplash, ADInplaceOrView, m) {
  m.impl("entmax_cache_append", adasplash::append_and_count);
  m.impl("entmax_key_index_update", adasplash::update_and_count);
}

// Torch would resolve a negated view that is written to by a copy, and fails as the op returns nothing; the checks
// refuse it, and what is only read is resolved by the backends.
TORCH_LIBRARY_IMPL(adasplash, Negative, m) {
  m.impl("entmax_cache_append", torch::CppFunction::makeFallthrough());
  m.impl("entmax_key_index_update", torch::CppFunction::makeFallthrough());
}

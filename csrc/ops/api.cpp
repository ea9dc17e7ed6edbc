// The C++ functions of adasplash.h, through the dispatcher, so that autograd and autocast see them.
#include <ATen/core/dispatch/Dispatcher.h>

#include <utility>

#include "adasplash.h"

namespace adasplash {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

template <typename Alpha>
at::Tensor call_entmax_attn(const char* overload, const at::Tensor& query, const at::Tensor& key,
                            const at::Tensor& value, Alpha alpha, bool is_causal, std::optional<double> scale,
                            const OptionalTensor& q_seqlens, const OptionalTensor& kv_seqlens, c10::IntArrayRef window,
                            const OptionalTensor& alibi_slopes) {
  using Signature =
      at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, Alpha, bool, std::optional<double>,
                 const OptionalTensor&, const OptionalTensor&, c10::IntArrayRef, const OptionalTensor&);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("adasplash::entmax_attn", overload).typed<Signature>();
  return op.call(query, key, value, alpha, is_causal, scale, q_seqlens, kv_seqlens, window, alibi_slopes);
}

template <typename Alpha>
at::Tensor call_entmax_attn_varlen(const char* overload, const at::Tensor& query, const at::Tensor& key,
                                   const at::Tensor& value, const at::Tensor& cu_seqlens_q,
                                   const at::Tensor& cu_seqlens_k, c10::SymInt max_seqlen_q, c10::SymInt max_seqlen_k,
                                   Alpha alpha, bool is_causal, std::optional<double> scale, c10::IntArrayRef window,
                                   const OptionalTensor& alibi_slopes) {
  using Signature =
      at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                 c10::SymInt, c10::SymInt, Alpha, bool, std::optional<double>, c10::IntArrayRef, const OptionalTensor&);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("adasplash::entmax_attn_varlen", overload).typed<Signature>();
  return op.call(query, key, value, cu_seqlens_q, cu_seqlens_k, std::move(max_seqlen_q), std::move(max_seqlen_k), alpha,
                 is_causal, scale, window, alibi_slopes);
}

}  // namespace

at::Tensor entmax_attn(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, double alpha,
                       bool is_causal, std::optional<double> scale, const std::optional<at::Tensor>& q_seqlens,
                       const std::optional<at::Tensor>& kv_seqlens, c10::IntArrayRef window,
                       const std::optional<at::Tensor>& alibi_slopes) {
  return call_entmax_attn<double>("", query, key, value, alpha, is_causal, scale, q_seqlens, kv_seqlens, window,
                                  alibi_slopes);
}

at::Tensor entmax_attn(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& alpha,
                       bool is_causal, std::optional<double> scale, const std::optional<at::Tensor>& q_seqlens,
                       const std::optional<at::Tensor>& kv_seqlens, c10::IntArrayRef window,
                       const std::optional<at::Tensor>& alibi_slopes) {
  return call_entmax_attn<const at::Tensor&>("per_head", query, key, value, alpha, is_causal, scale, q_seqlens,
                                             kv_seqlens, window, alibi_slopes);
}

at::Tensor entmax_attn_varlen(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                              const at::Tensor& cu_seqlens_q, const at::Tensor& cu_seqlens_k, c10::SymInt max_seqlen_q,
                              c10::SymInt max_seqlen_k, double alpha, bool is_causal, std::optional<double> scale,
                              c10::IntArrayRef window, const std::optional<at::Tensor>& alibi_slopes) {
  return call_entmax_attn_varlen<double>("", query, key, value, cu_seqlens_q, cu_seqlens_k, std::move(max_seqlen_q),
                                         std::move(max_seqlen_k), alpha, is_causal, scale, window, alibi_slopes);
}

at::Tensor entmax_attn_varlen(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                              const at::Tensor& cu_seqlens_q, const at::Tensor& cu_seqlens_k, c10::SymInt max_seqlen_q,
                              c10::SymInt max_seqlen_k, const at::Tensor& alpha, bool is_causal,
                              std::optional<double> scale, c10::IntArrayRef window,
                              const std::optional<at::Tensor>& alibi_slopes) {
  return call_entmax_attn_varlen<const at::Tensor&>("per_head", query, key, value, cu_seqlens_q, cu_seqlens_k,
                                                    std::move(max_seqlen_q), std::move(max_seqlen_k), alpha, is_causal,
                                                    scale, window, alibi_slopes);
}

at::Tensor entmax(const at::Tensor& input, double alpha, int64_t dim) {
  using Signature = at::Tensor(const at::Tensor&, double, int64_t);
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("adasplash::entmax", "").typed<Signature>();
  return op.call(input, alpha, dim);
}

at::Tensor entmax(const at::Tensor& input, const at::Tensor& alpha, int64_t dim) {
  using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, int64_t);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("adasplash::entmax", "tensor_alpha").typed<Signature>();
  return op.call(input, alpha, dim);
}

const char* version() { return ADASPLASH_VERSION; }

}  // namespace adasplash

// The C++ functions of adasplash.h, through the dispatcher, so that autograd and autocast see them.
#include <utility>

#include "adasplash.h"
#include "ops/dispatcher.h"
#include "ops/options.h"

namespace adasplash {

at::Tensor entmax_attn(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, double alpha,
                       bool is_causal, std::optional<double> scale, const std::optional<at::Tensor>& q_seqlens,
                       const std::optional<at::Tensor>& kv_seqlens, c10::IntArrayRef window,
                       const std::optional<at::Tensor>& alibi_slopes, const std::optional<at::Tensor>& kv_starts,
                       double dropout_p, const std::optional<at::Tensor>& dropout_seed,
                       const std::optional<at::Tensor>& key_index, const std::optional<at::Tensor>& q_positions,
                       const std::optional<at::Tensor>& dropout_origin) {
  static const auto op = find_op<PaddedSignature<double>>("adasplash::entmax_attn");
  return op.call(query, key, value, alpha, is_causal, scale, q_seqlens, kv_seqlens, window, alibi_slopes, kv_starts,
                 dropout_p, dropout_seed, key_index, q_positions, dropout_origin);
}

at::Tensor entmax_attn(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& alpha,
                       bool is_causal, std::optional<double> scale, const std::optional<at::Tensor>& q_seqlens,
                       const std::optional<at::Tensor>& kv_seqlens, c10::IntArrayRef window,
                       const std::optional<at::Tensor>& alibi_slopes, const std::optional<at::Tensor>& kv_starts,
                       double dropout_p, const std::optional<at::Tensor>& dropout_seed,
                       const std::optional<at::Tensor>& key_index, const std::optional<at::Tensor>& q_positions,
                       const std::optional<at::Tensor>& dropout_origin) {
  static const auto op = find_op<PaddedSignature<PerHead>>("adasplash::entmax_attn", "per_head");
  return op.call(query, key, value, alpha, is_causal, scale, q_seqlens, kv_seqlens, window, alibi_slopes, kv_starts,
                 dropout_p, dropout_seed, key_index, q_positions, dropout_origin);
}

at::Tensor entmax_attn_varlen(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                              const at::Tensor& cu_seqlens_q, const at::Tensor& cu_seqlens_k, c10::SymInt max_seqlen_q,
                              c10::SymInt max_seqlen_k, double alpha, bool is_causal, std::optional<double> scale,
                              c10::IntArrayRef window, const std::optional<at::Tensor>& alibi_slopes, double dropout_p,
                              const std::optional<at::Tensor>& dropout_seed,
                              const std::optional<at::Tensor>& q_positions,
                              const std::optional<at::Tensor>& dropout_origin) {
  static const auto op = find_op<PackedSignature<double>>("adasplash::entmax_attn_varlen");
  return op.call(query, key, value, cu_seqlens_q, cu_seqlens_k, std::move(max_seqlen_q), std::move(max_seqlen_k), alpha,
                 is_causal, scale, window, alibi_slopes, dropout_p, dropout_seed, q_positions, dropout_origin);
}

at::Tensor entmax_attn_varlen(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                              const at::Tensor& cu_seqlens_q, const at::Tensor& cu_seqlens_k, c10::SymInt max_seqlen_q,
                              c10::SymInt max_seqlen_k, const at::Tensor& alpha, bool is_causal,
                              std::optional<double> scale, c10::IntArrayRef window,
                              const std::optional<at::Tensor>& alibi_slopes, double dropout_p,
                              const std::optional<at::Tensor>& dropout_seed,
                              const std::optional<at::Tensor>& q_positions,
                              const std::optional<at::Tensor>& dropout_origin) {
  static const auto op = find_op<PackedSignature<PerHead>>("adasplash::entmax_attn_varlen", "per_head");
  return op.call(query, key, value, cu_seqlens_q, cu_seqlens_k, std::move(max_seqlen_q), std::move(max_seqlen_k), alpha,
                 is_causal, scale, window, alibi_slopes, dropout_p, dropout_seed, q_positions, dropout_origin);
}

AttentionSummary entmax_attn_summary(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, double alpha, bool is_causal,
    std::optional<double> scale, const std::optional<at::Tensor>& q_seqlens,
    const std::optional<at::Tensor>& kv_seqlens, c10::IntArrayRef window, const std::optional<at::Tensor>& alibi_slopes,
    const std::optional<at::Tensor>& kv_starts, double dropout_p, const std::optional<at::Tensor>& dropout_seed,
    const std::optional<at::Tensor>& key_index, const std::optional<at::Tensor>& q_positions,
    const std::optional<at::Tensor>& dropout_origin) {
  static const auto op = find_op<PaddedSignature<double, AttentionSummary>>("adasplash::entmax_attn_summary");
  return op.call(query, key, value, alpha, is_causal, scale, q_seqlens, kv_seqlens, window, alibi_slopes, kv_starts,
                 dropout_p, dropout_seed, key_index, q_positions, dropout_origin);
}

AttentionSummary entmax_attn_summary(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& alpha, bool is_causal,
    std::optional<double> scale, const std::optional<at::Tensor>& q_seqlens,
    const std::optional<at::Tensor>& kv_seqlens, c10::IntArrayRef window, const std::optional<at::Tensor>& alibi_slopes,
    const std::optional<at::Tensor>& kv_starts, double dropout_p, const std::optional<at::Tensor>& dropout_seed,
    const std::optional<at::Tensor>& key_index, const std::optional<at::Tensor>& q_positions,
    const std::optional<at::Tensor>& dropout_origin) {
  static const auto op =
      find_op<PaddedSignature<PerHead, AttentionSummary>>("adasplash::entmax_attn_summary", "per_head");
  return op.call(query, key, value, alpha, is_causal, scale, q_seqlens, kv_seqlens, window, alibi_slopes, kv_starts,
                 dropout_p, dropout_seed, key_index, q_positions, dropout_origin);
}

AttentionSummary entmax_attn_varlen_summary(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                            const at::Tensor& cu_seqlens_q, const at::Tensor& cu_seqlens_k,
                                            c10::SymInt max_seqlen_q, c10::SymInt max_seqlen_k, double alpha,
                                            bool is_causal, std::optional<double> scale, c10::IntArrayRef window,
                                            const std::optional<at::Tensor>& alibi_slopes, double dropout_p,
                                            const std::optional<at::Tensor>& dropout_seed,
                                            const std::optional<at::Tensor>& q_positions,
                                            const std::optional<at::Tensor>& dropout_origin) {
  static const auto op = find_op<PackedSignature<double, AttentionSummary>>("adasplash::entmax_attn_varlen_summary");
  return op.call(query, key, value, cu_seqlens_q, cu_seqlens_k, std::move(max_seqlen_q), std::move(max_seqlen_k), alpha,
                 is_causal, scale, window, alibi_slopes, dropout_p, dropout_seed, q_positions, dropout_origin);
}

AttentionSummary entmax_attn_varlen_summary(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                            const at::Tensor& cu_seqlens_q, const at::Tensor& cu_seqlens_k,
                                            c10::SymInt max_seqlen_q, c10::SymInt max_seqlen_k, const at::Tensor& alpha,
                                            bool is_causal, std::optional<double> scale, c10::IntArrayRef window,
                                            const std::optional<at::Tensor>& alibi_slopes, double dropout_p,
                                            const std::optional<at::Tensor>& dropout_seed,
                                            const std::optional<at::Tensor>& q_positions,
                                            const std::optional<at::Tensor>& dropout_origin) {
  static const auto op =
      find_op<PackedSignature<PerHead, AttentionSummary>>("adasplash::entmax_attn_varlen_summary", "per_head");
  return op.call(query, key, value, cu_seqlens_q, cu_seqlens_k, std::move(max_seqlen_q), std::move(max_seqlen_k), alpha,
                 is_causal, scale, window, alibi_slopes, dropout_p, dropout_seed, q_positions, dropout_origin);
}

at::Tensor entmax_attn_paged(const at::Tensor& query, const at::Tensor& key_cache, const at::Tensor& value_cache,
                             const at::Tensor& block_table, const at::Tensor& kv_seqlens, double alpha, bool is_causal,
                             const std::optional<at::Tensor>& cu_seqlens_q, c10::SymInt max_seqlen_q,
                             std::optional<double> scale, c10::IntArrayRef window,
                             const std::optional<at::Tensor>& alibi_slopes,
                             const std::optional<at::Tensor>& key_index) {
  static const auto op = find_op<PagedSignature<double>>("adasplash::entmax_attn_paged");
  return op.call(query, key_cache, value_cache, block_table, kv_seqlens, alpha, is_causal, cu_seqlens_q,
                 std::move(max_seqlen_q), scale, window, alibi_slopes, key_index);
}

at::Tensor entmax_attn_paged(const at::Tensor& query, const at::Tensor& key_cache, const at::Tensor& value_cache,
                             const at::Tensor& block_table, const at::Tensor& kv_seqlens, const at::Tensor& alpha,
                             bool is_causal, const std::optional<at::Tensor>& cu_seqlens_q, c10::SymInt max_seqlen_q,
                             std::optional<double> scale, c10::IntArrayRef window,
                             const std::optional<at::Tensor>& alibi_slopes,
                             const std::optional<at::Tensor>& key_index) {
  static const auto op = find_op<PagedSignature<PerHead>>("adasplash::entmax_attn_paged", "per_head");
  return op.call(query, key_cache, value_cache, block_table, kv_seqlens, alpha, is_causal, cu_seqlens_q,
                 std::move(max_seqlen_q), scale, window, alibi_slopes, key_index);
}

void entmax_cache_append(const at::Tensor& key, const at::Tensor& value, const at::Tensor& key_cache,
                         const at::Tensor& value_cache, const at::Tensor& slots,
                         const std::optional<at::Tensor>& key_index) {
  static const auto op = find_op<decltype(entmax_cache_append)>("adasplash::entmax_cache_append");
  op.call(key, value, key_cache, value_cache, slots, key_index);
}

at::Tensor entmax_make_key_index(const at::Tensor& key_cache) {
  static const auto op = find_op<decltype(entmax_make_key_index)>("adasplash::entmax_make_key_index");
  return op.call(key_cache);
}

void entmax_key_index_update(const at::Tensor& key_cache, const at::Tensor& slots, const at::Tensor& key_index) {
  static const auto op = find_op<decltype(entmax_key_index_update)>("adasplash::entmax_key_index_update");
  op.call(key_cache, slots, key_index);
}

at::Tensor entmax(const at::Tensor& input, double alpha, int64_t dim) {
  static const auto op = find_op<at::Tensor(const at::Tensor&, double, int64_t)>("adasplash::entmax");
  return op.call(input, alpha, dim);
}

at::Tensor entmax(const at::Tensor& input, const at::Tensor& alpha, int64_t dim) {
  static const auto op =
      find_op<at::Tensor(const at::Tensor&, const at::Tensor&, int64_t)>("adasplash::entmax", "tensor_alpha");
  return op.call(input, alpha, dim);
}

const char* version() { return ADASPLASH_VERSION; }

}  // namespace adasplash

#include "ops/cache.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty.h>

#include <limits>

#include "ops/attention_checks.h"
#include "ops/dispatcher.h"
#include "ops/key_index.h"

namespace adasplash {
namespace {

// Keys or values that fit query: of its type, on its device.
void check_tensor(const char* op, const char* name, const at::Tensor& tensor, int64_t dim, const char* shape,
                  const char* like_name, const at::Tensor& like) {
  check_dense(op, name, tensor, dim, shape, like);
  TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), op, ": ", name, " must have ", like_name, "'s dtype ",
              like.scalar_type(), ", got ", tensor.scalar_type());
}

// That values are as many as keys, in cache and out of it.
void check_caches(const char* op, const at::Tensor& key_cache, const at::Tensor& value_cache) {
  check_size(op, "value_cache", "number of pages", value_cache.sym_size(0), "key_cache's", key_cache.sym_size(0));
  check_size(op, "value_cache", "page size", value_cache.sym_size(1), "key_cache's", key_cache.sym_size(1));
  check_size(op, "value_cache", "number of heads", value_cache.sym_size(2), "key_cache's", key_cache.sym_size(2));
}

constexpr const char* kKeyCacheShape = "(blocks, page, kv_heads, head_dim)";
constexpr const char* kValueCacheShape = "(blocks, page, kv_heads, value_dim)";

}  // namespace

PagedCall PagedCall::of(const at::Tensor& query, const at::Tensor& key_cache, const at::Tensor& value_cache,
                        const at::Tensor& block_table, const at::Tensor& kv_seqlens, const AttentionOptions& options) {
  constexpr const char* op = "entmax_attn_paged";
  TORCH_CHECK(query.defined(), op, ": query must be a tensor, got none");
  check_type(op, "query", query);
  check_dense(op, "query", query, 3, "(tokens, heads, head_dim)", query);
  check_tensor(op, "key_cache", key_cache, 4, kKeyCacheShape, "query", query);
  check_tensor(op, "value_cache", value_cache, 4, kValueCacheShape, "query", query);
  check_caches(op, key_cache, value_cache);
  check_dense(op, "block_table", block_table, 2, "(batch, pages)", query);
  TORCH_CHECK(block_table.scalar_type() == at::kInt || block_table.scalar_type() == at::kLong, op,
              ": block_table must be int32 or int64, got ", block_table.scalar_type());
  const c10::SymInt batch = block_table.sym_size(0), longest = options.max_seqlen_q;
  check_lengths(op, "kv_seqlens", "(batch,)", kv_seqlens, query);
  check_size(op, "kv_seqlens", "batch size", kv_seqlens.sym_size(0), "block_table's", batch);
  TORCH_SYM_CHECK(longest.sym_ge(0), op, ": max_seqlen_q must be 0 or more, got ", longest);

  PagedCall call{
      .query = query, .key = key_cache.transpose(1, 2), .value = value_cache.transpose(1, 2), .options = options};
  call.options.block_table = block_table;
  call.options.kv_seqlens = kv_seqlens;
  if (options.cu_seqlens_q) {
    check_lengths(op, "cu_seqlens_q", "(batch + 1,)", *options.cu_seqlens_q, query);
    check_size(op, "cu_seqlens_q", "size", options.cu_seqlens_q->sym_size(0), "one more than block_table's batch,",
               batch + 1);
  } else {
    TORCH_SYM_CHECK(longest.sym_le(std::numeric_limits<int32_t>::max()), op,
                    ": max_seqlen_q must be at most 2^31 - 1, ", "got ", longest);
    TORCH_SYM_CHECK(query.sym_size(0).sym_eq(batch * longest), op, ": without cu_seqlens_q query must have ",
                    "max_seqlen_q tokens for each sequence, ", longest, " * ", batch, ", got ", query.sym_size(0));
    call.query = query.unflatten_symint(0, {batch, longest}).transpose(1, 2);
  }
  const auto shape = AttentionShape::of(call.query, call.key, call.value, call.options);
  check_size(op, "key_cache", "head_dim", key_cache.sym_size(-1), "query's", shape.head_dim);
  check_heads(op, shape);
  check_options(op, shape, query, call.options);
  if (options.key_index) check_key_index(op, key_cache, *options.key_index);
  return call;
}

at::Tensor PagedCall::allocate() const {
  const auto shape = AttentionShape::of(query, key, value, options);
  const c10::SymInt tokens = options.packed() ? shape.queries : shape.batch * shape.queries;
  return at::empty_symint({tokens, shape.heads, shape.value_dim}, query.options());
}

at::Tensor PagedCall::in_form(const at::Tensor& out) const {
  if (options.packed()) return out;
  return out.unflatten_symint(0, {query.sym_size(0), query.sym_size(2)}).transpose(1, 2);
}

at::Tensor call_paged(const at::Tensor& query, const at::Tensor& key_cache, const at::Tensor& value_cache,
                      const at::Tensor& block_table, const at::Tensor& kv_seqlens, const AttentionOptions& options) {
  static const auto by_number = find_op<PagedSignature<double>>("adasplash::entmax_attn_paged");
  static const auto by_head = find_op<PagedSignature<PerHead>>("adasplash::entmax_attn_paged", "per_head");
  const auto tensors = std::tie(query, key_cache, value_cache, block_table, kv_seqlens);
  const auto rest = get_options(options, kPagedOptions);
  return options.head_alpha ? call_with(by_head, tensors, std::tie(*options.head_alpha), rest)
                            : call_with(by_number, tensors, std::tie(options.alpha), rest);
}

void check_append(const at::Tensor& key, const at::Tensor& value, const at::Tensor& key_cache,
                  const at::Tensor& value_cache, const at::Tensor& slots, const OptionalTensor& key_index) {
  constexpr const char* op = "entmax_cache_append";
  TORCH_CHECK(key.defined(), op, ": key must be a tensor, got none");
  check_type(op, "key", key);
  check_dense(op, "key", key, 3, "(tokens, kv_heads, head_dim)", key);
  check_tensor(op, "value", value, 3, "(tokens, kv_heads, value_dim)", "key", key);
  check_tensor(op, "key_cache", key_cache, 4, kKeyCacheShape, "key", key);
  check_tensor(op, "value_cache", value_cache, 4, kValueCacheShape, "key", key);
  check_caches(op, key_cache, value_cache);
  check_size(op, "value", "number of tokens", value.sym_size(0), "key's", key.sym_size(0));
  for (const auto& [name, tensor, cache] :
       {std::tuple{"key", key, key_cache}, std::tuple{"value", value, value_cache}}) {
    check_size(op, name, "number of heads", tensor.sym_size(1), "its cache's", cache.sym_size(2));
    check_size(op, name, "head size", tensor.sym_size(2), "its cache's", cache.sym_size(3));
  }
  for (const auto& [name, cache] : {std::pair{"key_cache", key_cache}, std::pair{"value_cache", value_cache}}) {
    // A place that several slots share would hold whichever was written last.
    TORCH_CHECK(at::has_internal_overlap(cache) != at::MemOverlap::Yes, op, ": ", name,
                " must not have several rows in one place, as an expanded tensor has, got strides ",
                cache.sym_strides());
    TORCH_CHECK(!cache.is_neg(), op, ": ", name, " must not be a negated view of another tensor");
  }
  check_lengths(op, "slots", "(tokens,)", slots, key);
  check_size(op, "slots", "size", slots.sym_size(0), "key's number of tokens,", key.sym_size(0));
  if (key_index) check_key_index(op, key_cache, *key_index);
}

at::Tensor apart_from(const at::Tensor& tokens, const at::Tensor& key_cache, const at::Tensor& value_cache) {
  const at::Tensor plain = tokens.resolve_neg();
  const bool shared = plain.is_alias_of(key_cache) || plain.is_alias_of(value_cache);
  return shared ? plain.clone() : plain;
}

}  // namespace adasplash

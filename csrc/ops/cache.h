// Attention on a paged cache of keys and values, and what writes to the cache.
//
// A cache is (blocks, page, H_kv, D), of any strides: `blocks` pages with room for `page` keys each. The pages of a
// sequence need not be neighbours: block_table (B, W) int32 or int64 names them, so that key j of sequence b is row
// j % page of page block_table[b, j / page]. A slot is such a place as one number, page number * page + row.
#pragma once

#include <torch/library.h>

#include <utility>

#include "ops/attention.h"

namespace adasplash {

// What a backend implements of entmax_attn_paged. Query is (B, H, M, D), or packed (T, H, D); `out`, which it writes
// all of, has its form. Key and value are (blocks, H_kv, page, D). Of the options block_table and kv_seqlens are given.
using PagedKernel = void (*)(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                             const AttentionOptions& options, const at::Tensor& out);

// The op's arguments in the forms that its kernels take.
struct PagedCall {
  at::Tensor query, key, value;
  AttentionOptions options;

  // Of the op's own arguments and options. Throws unless they fit the contract; what lengths and tables hold is not
  // looked at.
  static PagedCall of(const at::Tensor& query, const at::Tensor& key_cache, const at::Tensor& value_cache,
                      const at::Tensor& block_table, const at::Tensor& kv_seqlens, const AttentionOptions& options);

  // (T, H, D_v), and the same in the form that a kernel writes.
  at::Tensor allocate() const;
  at::Tensor in_form(const at::Tensor& out) const;
};

// entmax_attn_paged through the dispatcher, by alpha's kind.
at::Tensor call_paged(const at::Tensor& query, const at::Tensor& key_cache, const at::Tensor& value_cache,
                      const at::Tensor& block_table, const at::Tensor& kv_seqlens, const AttentionOptions& options);

// Throws unless the arguments of entmax_cache_append fit the contract. What slots and index hold is not looked at.
void check_append(const at::Tensor& key, const at::Tensor& value, const at::Tensor& key_cache,
                  const at::Tensor& value_cache, const at::Tensor& slots, const OptionalTensor& key_index);

// Tokens as a backend writes them to the caches: a copy where they are a part of these, as some would be read after
// they were written.
at::Tensor apart_from(const at::Tensor& tokens, const at::Tensor& key_cache, const at::Tensor& value_cache);

// entmax_attn_paged over a function of its arguments and options, with the signature that options.h makes for it.
template <auto function, typename Signature>
struct PagedOp;
template <auto function, typename Alpha, typename... Options>
struct PagedOp<function, at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                    const at::Tensor&, Alpha, Options...)> {
  static at::Tensor call(const at::Tensor& query, const at::Tensor& key_cache, const at::Tensor& value_cache,
                         const at::Tensor& block_table, const at::Tensor& kv_seqlens, Alpha alpha, Options... options) {
    AttentionOptions o;
    set_alpha(o, alpha);
    set_options(o, kPagedOptions, std::move(options)...);
    return function(query, key_cache, value_cache, block_table, kv_seqlens, o);
  }
};

// What a backend registers over its kernel.
template <PagedKernel kernel>
at::Tensor attend_paged(const at::Tensor& query, const at::Tensor& key_cache, const at::Tensor& value_cache,
                        const at::Tensor& block_table, const at::Tensor& kv_seqlens, const AttentionOptions& options) {
  const PagedCall call = PagedCall::of(query, key_cache, value_cache, block_table, kv_seqlens, options);
  const at::Tensor out = call.allocate();
  kernel(call.query, call.key, call.value, call.options, call.in_form(out));
  return out;
}

// Registers both overloads.
template <auto function>
void implement_paged(torch::Library& m) {
  m.impl("entmax_attn_paged", PagedOp<function, PagedSignature<double>>::call);
  m.impl("entmax_attn_paged.per_head", PagedOp<function, PagedSignature<PerHead>>::call);
}

}  // namespace adasplash

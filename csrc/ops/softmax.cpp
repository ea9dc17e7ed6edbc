#include "ops/softmax.h"

#include <ATen/ops/_scaled_dot_product_attention_math.h>
#include <ATen/ops/scaled_dot_product_attention.h>

namespace adasplash {
namespace {

// A single query sees every key, as without a mask; torch, which aligns its mask top left, would show it the first one.
bool hides_keys(const AttentionShape& shape, const AttentionOptions& options) {
  return options.is_causal && shape.queries != 1;
}

}  // namespace

bool torch_serves(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const AttentionOptions& o) {
  if (!o.softmax() || o.packed() || o.q_seqlens || o.kv_seqlens || o.kv_starts || o.alibi_slopes || o.dropout_p > 0 ||
      o.q_positions || o.window[0] != -1 || o.window[1] != -1) {
    return false;
  }
  const auto shape = AttentionShape::of(query, key, value, o);
  return shape.head_dim == shape.value_dim && (!hides_keys(shape, o) || shape.queries == shape.keys);
}

at::Tensor softmax_attn(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                        const AttentionOptions& o) {
  const auto shape = AttentionShape::of(query, key, value, o);
  const bool is_causal = hides_keys(shape, o), grouped = shape.heads != shape.kv_heads;
  // Its CUDA kernels fail where there is nothing to do (2.11 divides by the number of heads).
  if (query.sym_numel() == 0 || key.sym_numel() == 0) {
    return std::get<0>(at::_scaled_dot_product_attention_math(query, key, value, {}, /*dropout_p=*/0.0, is_causal,
                                                              /*dropout_mask=*/{}, o.scale, grouped))
        .contiguous();
  }
  // Its fused kernels want dense rows; without them it would build the M x N matrix.
  const auto dense = [](const at::Tensor& t) { return t.sym_stride(3) == 1 ? t : t.contiguous(); };
  return at::scaled_dot_product_attention(dense(query), dense(key), dense(value), {}, /*dropout_p=*/0.0, is_causal,
                                          o.scale, grouped)
      .contiguous();
}

}  // namespace adasplash

#include "ops/softmax.h"

#include <ATen/ops/_scaled_dot_product_attention_math.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <c10/util/Exception.h>

namespace adasplash {

at::Tensor softmax_attn(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                        const AttentionOptions& o) {
  const auto refuse_if = [](bool given, const char* option) {
    TORCH_CHECK(!given, "entmax_attn: alpha = 1 (softmax) goes to scaled_dot_product_attention, which has no ", option,
                "; leave it at its default, or use alpha from 1.01 to 2");
  };
  refuse_if(o.q_seqlens.has_value(), "q_seqlens");
  refuse_if(o.kv_seqlens.has_value(), "kv_seqlens");
  refuse_if(o.window[0] != -1 || o.window[1] != -1, "window");
  refuse_if(o.alibi_slopes.has_value(), "alibi_slopes");
  const auto shape = AttentionShape::of(query, key, value, o);
  TORCH_CHECK(!o.is_causal || shape.queries == shape.keys,
              "entmax_attn: alpha = 1 (softmax) with is_causal needs as many queries as keys, got ", shape.queries,
              " and ", shape.keys, "; scaled_dot_product_attention aligns its mask top left, this op bottom right");
  TORCH_CHECK(shape.head_dim == shape.value_dim,
              "entmax_attn: alpha = 1 (softmax) needs value's head_dim to be query's, got ", shape.value_dim, " and ",
              shape.head_dim);
  // Its CUDA kernels fail where there is nothing to do (2.11 divides by the number of heads).
  if (query.sym_numel() == 0 || key.sym_numel() == 0) {
    return std::get<0>(at::_scaled_dot_product_attention_math(query, key, value, {}, /*dropout_p=*/0.0, o.is_causal,
                                                              /*dropout_mask=*/{}, o.scale,
                                                              /*enable_gqa=*/shape.heads != shape.kv_heads))
        .contiguous();
  }
  // Its fused kernels want dense rows; without them it would build the M x N matrix.
  const auto dense = [](const at::Tensor& t) { return t.sym_stride(3) == 1 ? t : t.contiguous(); };
  return at::scaled_dot_product_attention(dense(query), dense(key), dense(value), {}, /*dropout_p=*/0.0, o.is_causal,
                                          o.scale, /*enable_gqa=*/shape.heads != shape.kv_heads)
      .contiguous();
}

}  // namespace adasplash

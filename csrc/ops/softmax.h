// alpha = 1 is softmax, for which torch's own attention serves where it means the same.
#pragma once

#include "ops/attention.h"

namespace adasplash {

// Whether torch's scaled_dot_product_attention computes this call: softmax in the padded form, without an option that
// it does not have or has in another sense. All others are for the kernels of this library.
bool torch_serves(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                  const AttentionOptions& options);

// The call by torch, if torch serves it.
at::Tensor softmax_attn(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                        const AttentionOptions& options);

}  // namespace adasplash

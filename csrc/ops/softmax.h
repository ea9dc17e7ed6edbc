// alpha = 1 is softmax, for which torch's own attention serves.
#pragma once

#include "ops/attention.h"

namespace adasplash {

inline bool is_softmax(const AttentionOptions& options) { return !options.head_alpha && options.alpha == 1; }

// Attention in the padded form, by torch. Throws where an option is given that torch's attention does not have, or has
// in another sense.
at::Tensor softmax_attn(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                        const AttentionOptions& options);

}  // namespace adasplash

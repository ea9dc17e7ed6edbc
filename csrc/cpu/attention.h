// The forward of attention on the CPU, wherever keys are.
#pragma once

#include "ops/attention.h"

namespace adasplash::cpu {

// Writes all rows of `out` that a sequence has, and what `saved` has room for. Throws where lengths, pages, alpha or
// slopes hold what they must not.
void attend(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const AttentionOptions& options,
            const SavedForBackward& saved, const at::Tensor& out);

}  // namespace adasplash::cpu

// _entmax_attn_summary on the GPU: checks, and the parts that the chosen implementation runs.
#include "ops/summary.h"

#include <c10/core/DeviceGuard.h>

#include "cuda/implementation.h"
#include "cuda/ops.h"
#include "cuda/part.h"
#include "ops/attention_checks.h"

namespace adasplash::cuda {

SummaryResult summarize(const at::Tensor& query, const at::Tensor& key, const SavedForBackward& saved,
                        const AttentionOptions& options) {
  const AttentionInputs inputs{"_entmax_attn_summary", query, key, key, options};  // nobody reads the values
  check_attention(inputs.op, query, key, key, options);
  check_saved(inputs.op, query, key, saved, options);
  auto result = allocate_summary(query, key, saved, options);
  auto& [support_size, largest_weight, tile_counts] = result;
  const Implementation& implementation = implementation_for(inputs);
  const c10::DeviceGuard guard(query.device());

  if (options.packed()) {  // for tokens that no sequence has, where lengths contradict the tensors
    support_size.zero_();
    largest_weight.zero_();
  }
  tile_counts.zero_();
  if (support_size.numel() == 0) return result;

  const at::Tensor row_state = saved.row_state.contiguous(), tiles = saved.tiles.contiguous();
  for (const Part& part : Part::all(inputs, implementation.summary_scratch(inputs))) {
    const at::Tensor keys = part.keys(key);
    implementation.summarize({inputs.op, part.queries(query), keys, keys, part.options(options), part.first()},
                             {part.rows(row_state), part.rows(tiles)},
                             {part.rows(support_size), part.rows(largest_weight), part.queries(tile_counts)});
  }
  return result;
}

}  // namespace adasplash::cuda

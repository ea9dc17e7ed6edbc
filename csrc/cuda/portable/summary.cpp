// The summary of the portable kernels: one launch of `count_support`.
#include "cuda/portable/call.h"
#include "cuda/portable/portable.h"

namespace adasplash::cuda::portable {
namespace {

constexpr Piece<int32_t> kTileLists{"tile_lists", 1, &Extents::query_tile_pairs};
constexpr Scratch kSummaryScratch = {kTileLists};

}  // namespace

Scratch Portable::summary_scratch(const AttentionInputs&) const { return kSummaryScratch; }

void Portable::summarize(const AttentionInputs& inputs, const SummaryInputs& saved,
                         const SummaryOutputs& outputs) const {
  const PreparedCall call(inputs);
  const Workspace workspace(kSummaryScratch, call.extents(), call.query);
  const Variant& variant = call.variant(Kernel::kCountSupport);
  count_support(variant, call.place, call.query_programs(variant),
                {
                    .query = matrix_of(call.query),
                    .key = matrix_of(call.key),
                    .row_state = saved.row_state.const_data_ptr<float>(),
                    .tiles = saved.tiles.const_data_ptr<int32_t>(),
                    .tile_lists = workspace.write(kTileLists),
                    .support_size = outputs.support_size.mutable_data_ptr<int32_t>(),
                    .largest_weight = outputs.largest_weight.mutable_data_ptr<float>(),
                    .tile_counts = outputs.tile_counts.mutable_data_ptr<int64_t>(),
                    .counts_batch_stride = outputs.tile_counts.stride(0),
                    .call = call.arguments,
                });
}

}  // namespace adasplash::cuda::portable

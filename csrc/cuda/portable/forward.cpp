// The forward of the portable kernels: one launch of `attend`.
#include "cuda/portable/call.h"
#include "cuda/portable/portable.h"

namespace adasplash::cuda::portable {
namespace {

constexpr Piece<int16_t> kTileMargins{"tile_margins", 4, &Extents::query_tile_pairs};
constexpr Piece<int32_t> kTileLists{"tile_lists", 1, &Extents::query_tile_pairs};
constexpr Scratch kTrainingScratch = {kTileMargins, kTileLists};

// Inference keeps nothing, but the kernel writes these in any case.
constexpr Piece<float> kRowState{"row_state", 2, &Extents::state_rows};
constexpr Piece<int32_t> kTiles{"tiles", 1, &Extents::tile_words};
constexpr Scratch kInferenceScratch = {kTileMargins, kRowState, kTileLists, kTiles};

}  // namespace

const Scratch& Portable::forward_scratch(const AttentionInputs&, bool training) const {
  return training ? kTrainingScratch : kInferenceScratch;
}

void Portable::forward(const AttentionInputs& inputs, const ForwardOutputs& outputs) const {
  const PreparedCall call(inputs);
  const AlignedResult out(outputs.out);
  const bool training = outputs.row_state.defined();
  const Workspace workspace(forward_scratch(inputs, training), call.extents(), call.query);

  const Variant& variant = call.variant(Kernel::kAttend);
  attend(variant, call.place, call.query_programs(variant),
         {
             .query = matrix_of(call.query),
             .key = matrix_of(call.key),
             .value = matrix_of(call.value),
             .out = mutable_matrix_of(out.rows),
             .row_state = training ? outputs.row_state.mutable_data_ptr<float>() : workspace.write(kRowState),
             .tiles = training ? outputs.tiles.mutable_data_ptr<int32_t>() : workspace.write(kTiles),
             .tile_margins = workspace.write(kTileMargins),
             .tile_lists = workspace.write(kTileLists),
             .call = call.arguments,
         });
  out.finish();
}

}  // namespace adasplash::cuda::portable

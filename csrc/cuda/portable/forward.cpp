// The forward of the portable kernels: one launch of `attend`, and those of few.h for sequences of few queries.
#include "cuda/portable/call.h"
#include "cuda/portable/few.h"
#include "cuda/portable/portable.h"

namespace adasplash::cuda::portable {
namespace {

constexpr Piece<int16_t> kTileMargins{"tile_margins", 4, &Extents::query_tile_pairs};
constexpr Piece<int32_t> kTileLists{"tile_lists", 1, &Extents::query_tile_pairs};
// Inference keeps nothing, but the kernels write these in any case; those of few queries write no tile bits then.
constexpr Piece<float> kRowState{"row_state", 2, &Extents::state_rows};
constexpr Piece<int32_t> kTiles{"tiles", 1, &Extents::tile_words};

constexpr Scratch kTrainingScratch = {kTileMargins, kTileLists};
constexpr Scratch kInferenceScratch = {kTileMargins, kRowState, kTileLists, kTiles};
constexpr Scratch kFewTrainingScratch = {kScores,     kTileMax, kFewTileLists, kListedScores,
                                         kListedKeys, kIsLong,  kWeighted,     kWeightSums};
constexpr Scratch kFewInferenceScratch = {kRowState,   kScores, kTileMax,  kFewTileLists, kListedScores,
                                          kListedKeys, kIsLong, kWeighted, kWeightSums};
constexpr Scratch kFewIndexedScratch = {kRowState,    kScores,     kTileMax,  kFewTileLists, kListedScores,
                                        kListedKeys,  kIsLong,     kWeighted, kWeightSums,   kTurned,
                                        kTurnedTerms, kTileBounds, kFloors,   kFound};
// Where the lengths that the GPU has decide.
constexpr Scratch kBothTrainingScratch = {kTileMargins,  kTileLists,  kScores, kTileMax,  kFewTileLists,
                                          kListedScores, kListedKeys, kIsLong, kWeighted, kWeightSums};
constexpr Scratch kBothInferenceScratch = {kTileMargins,  kRowState,     kTileLists,  kTiles,  kScores,   kTileMax,
                                           kFewTileLists, kListedScores, kListedKeys, kIsLong, kWeighted, kWeightSums};
constexpr Scratch kBothIndexedScratch = {kTileMargins,  kRowState,     kTileLists,  kTiles,  kScores,   kTileMax,
                                         kFewTileLists, kListedScores, kListedKeys, kIsLong, kWeighted, kWeightSums,
                                         kTurned,       kTurnedTerms,  kTileBounds, kFloors, kFound};

}  // namespace

const Scratch& Portable::forward_scratch(const AttentionInputs& inputs, bool training) const {
  const FewQueries few = FewQueries::of(inputs);
  if (few.some() && uses_index(inputs)) return few.all() ? kFewIndexedScratch : kBothIndexedScratch;
  if (few.all()) return training ? kFewTrainingScratch : kFewInferenceScratch;
  if (few.some()) return training ? kBothTrainingScratch : kBothInferenceScratch;
  return training ? kTrainingScratch : kInferenceScratch;
}

void Portable::forward(const AttentionInputs& inputs, const ForwardOutputs& outputs) const {
  const PreparedCall call(inputs);
  const AlignedResult out(outputs.out);
  const bool training = outputs.row_state.defined();
  const Workspace workspace(forward_scratch(inputs, training), call.extents(), call.query);
  float* const row_state = training ? outputs.row_state.mutable_data_ptr<float>() : workspace.write(kRowState);
  const FewQueries few = FewQueries::of(inputs);

  if (few.all()) {
    if (training) outputs.tiles.zero_();  // bits are set one by one
  } else {
    call.over_keys([&]<typename KeyMatrix>(const KeyMatrix& key, const KeyMatrix& value) {
      using Kernels = KeyKernels<KeyMatrix>;
      const Variant& variant = call.variant(Kernels::kAttend);
      Kernels::attend(variant, call.place, call.query_programs(variant),
                      {
                          .query = matrix_of(call.query),
                          .key = key,
                          .value = value,
                          .out = mutable_matrix_of(out.rows),
                          .row_state = row_state,
                          .tiles = training ? outputs.tiles.mutable_data_ptr<int32_t>() : workspace.write(kTiles),
                          .tile_margins = workspace.write(kTileMargins),
                          .tile_lists = workspace.write(kTileLists),
                          .call = call.arguments,
                      });
    });
  }
  if (few.some()) {
    attend_few(call, few, workspace, out.rows, row_state,
               training ? outputs.tiles.mutable_data_ptr<int32_t>() : nullptr);
  }
  out.finish();
}

}  // namespace adasplash::cuda::portable

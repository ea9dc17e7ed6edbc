// The launches for sequences of few queries (triton_src/attention/few.py).
#pragma once

#include "cuda/few.h"
#include "cuda/portable/call.h"

namespace adasplash::cuda::portable {

constexpr Piece<float> kScores{"few_scores", kTile, &Extents::few_tiles};
constexpr Piece<float> kTileMax{"few_tile_max", 1, &Extents::few_tiles};
constexpr Piece<int32_t> kFewTileLists{"few_tile_lists", 1, &Extents::few_tiles};
constexpr Piece<float> kListedScores{"few_listed_scores", kListed, &Extents::few_rows};
constexpr Piece<int32_t> kListedKeys{"few_listed_keys", kListed, &Extents::few_rows};
constexpr Piece<int32_t> kIsLong{"few_is_long", 1, &Extents::few_rows};
constexpr Piece<float> kWeighted{"few_weighted", 1, &Extents::few_values};
constexpr Piece<float> kWeightSums{"few_weight_sums", 1, &Extents::few_splits};

// Where keys are found by an index.
constexpr Piece<int8_t> kTurned{"few_turned", kPlanes * 256, &Extents::few_rows};
constexpr Piece<float> kTurnedTerms{"few_turned_terms", kTerms, &Extents::few_rows};
constexpr Piece<float> kTileBounds{"few_tile_bounds", 1, &Extents::few_tiles};
constexpr Piece<float> kFloors{"few_floors", 1, &Extents::few_tiles};
constexpr Piece<int32_t> kFound{"few_found", 1, &Extents::few_found};

// tiles is null where nobody wants it; else it is zero.
void attend_few(const PreparedCall& call, const FewQueries& few, const Workspace& workspace, const at::Tensor& out,
                float* row_state, int32_t* tiles);

}  // namespace adasplash::cuda::portable

#include "cuda/portable/few.h"

namespace adasplash::cuda::portable {
namespace {

// Programs that keep a large GPU busy, several on each multiprocessor.
constexpr int64_t kManyPrograms = 1024;
constexpr int64_t kMostScored = 32;  // tiles for one program, of a sequence as long as there is room for
// Of weigh_few about two for each multiprocessor: mostly they find no long row and end.
constexpr int64_t kWeighing = 264;

constexpr int64_t in_blocks(int64_t count, int64_t block) { return (count + block - 1) / block; }

}  // namespace

void attend_few(const PreparedCall& call, const FewQueries& few, const Workspace& workspace, const at::Tensor& out,
                float* row_state, int32_t* tiles) {
  call.over_keys([&]<typename KeyMatrix>(const KeyMatrix& key, const KeyMatrix& value) {
    using Kernels = KeyKernels<KeyMatrix>;
    const int64_t rows = few.queries() * call.arguments.group.value;
    const int64_t key_tiles = count_tiles(call.arguments.keys.max_seqlen.value);
    const Variant& score = call.variant(Kernels::kScoreFew);
    const Variant& weigh = call.variant(Kernels::kWeighFew);
    // How many blocks of rows there are of all key heads, each of which all keys are split for.
    const int64_t row_blocks = in_blocks(rows, score.block_m) * call.kv_heads;
    const int64_t scored = std::clamp<int64_t>(key_tiles * row_blocks / kManyPrograms, 1, kMostScored);
    const int64_t scorers = in_blocks(key_tiles, scored);
    const int64_t weigh_blocks = in_blocks(rows, weigh.block_m) * call.kv_heads;
    const int64_t weighers = std::clamp<int64_t>(kWeighing / std::max<int64_t>(weigh_blocks, 1), 1,
                                                 std::max<int64_t>(in_blocks(key_tiles, kSplitTiles), 1));
    const Few few_argument{
        .queries = static_cast<int32_t>(few.queries()),
        .rows = static_cast<int32_t>(rows),
        .row_tiles = call.stored_kv_heads * call.arguments.keys.tile_rows.value,
        .scorers = static_cast<int32_t>(scorers),
        .weighers = static_cast<int32_t>(weighers),
        .marks_tiles = static_cast<int32_t>(tiles != nullptr),
    };
    Kernels::score_few(score, call.place, scorers * row_blocks,
                       {
                           .query = matrix_of(call.query),
                           .key = key,
                           .scores = workspace.write(kScores),
                           .tile_max = workspace.write(kTileMax),
                           .call = call.arguments,
                           .few = few_argument,
                       });
    Kernels::solve_few(call.variant(Kernels::kSolveFew), call.place, few.queries() * call.heads,
                       {
                           .value = value,
                           .out = mutable_matrix_of(out),
                           .row_state = row_state,
                           .tiles = tiles,
                           .scores = workspace.read(kScores),
                           .tile_max = workspace.read(kTileMax),
                           .tile_lists = workspace.write(kFewTileLists),
                           .listed_scores = workspace.write(kListedScores),
                           .listed_keys = workspace.write(kListedKeys),
                           .is_long = workspace.write(kIsLong),
                           .call = call.arguments,
                           .few = few_argument,
                       });
    Kernels::weigh_few(weigh, call.place, weighers * weigh_blocks,
                       {
                           .value = value,
                           .row_state = static_cast<const float*>(row_state),
                           .tiles = tiles,
                           .scores = workspace.read(kScores),
                           .tile_max = workspace.read(kTileMax),
                           .is_long = workspace.read(kIsLong),
                           .weighted = workspace.write(kWeighted),
                           .weight_sums = workspace.write(kWeightSums),
                           .call = call.arguments,
                           .few = few_argument,
                       });
    join_few(call.variant(Kernel::kJoinFew), call.place, few.queries() * call.heads,
             {
                 .weighted = workspace.read(kWeighted),
                 .weight_sums = workspace.read(kWeightSums),
                 .is_long = workspace.read(kIsLong),
                 .out = mutable_matrix_of(out),
                 .call = call.arguments,
                 .few = few_argument,
             });
  });
}

}  // namespace adasplash::cuda::portable

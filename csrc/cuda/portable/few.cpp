#include "cuda/portable/few.h"

namespace adasplash::cuda::portable {
namespace {

// Programs that keep a large GPU busy, several on each multiprocessor.
constexpr int64_t kManyPrograms = 1024;
constexpr int64_t kMostScored = 32;  // tiles for one program, of a sequence as long as there is room for
// Of weigh_few about two for each multiprocessor: mostly they find no long row and end.
constexpr int64_t kWeighing = 264;

constexpr int64_t in_blocks(int64_t count, int64_t block) { return (count + block - 1) / block; }

// How the work on a call's sequences of few queries is shared.
struct Shares {
  Shares(const PreparedCall& call, const FewQueries& few, const Variant& score, const Variant& weigh, bool marks_tiles)
      : rows(few.queries() * call.arguments.group.value),
        key_tiles(count_tiles(call.arguments.keys.max_seqlen.value)),
        score_blocks(in_blocks(rows, score.block_m) * call.kv_heads),
        weigh_blocks(in_blocks(rows, weigh.block_m) * call.kv_heads),
        argument{
            .queries = static_cast<int32_t>(few.queries()),
            .rows = static_cast<int32_t>(rows),
            .row_tiles = call.stored_kv_heads * call.arguments.keys.tile_rows.value,
            .scorers = static_cast<int32_t>(
                in_blocks(key_tiles, std::clamp<int64_t>(key_tiles * score_blocks / kManyPrograms, 1, kMostScored))),
            .weighers =
                static_cast<int32_t>(std::clamp<int64_t>(kWeighing / std::max<int64_t>(weigh_blocks, 1), 1,
                                                         std::max<int64_t>(in_blocks(key_tiles, kSplitTiles), 1))),
            .marks_tiles = static_cast<int32_t>(marks_tiles),
        } {}

  const int64_t rows, key_tiles;
  // How many blocks of rows there are of all key heads, each of which all keys are split for.
  const int64_t score_blocks, weigh_blocks;
  const Few argument;

  int64_t scoring() const { return argument.scorers.value * score_blocks; }
  int64_t weighing() const { return argument.weighers.value * weigh_blocks; }
};

// Scores, of all keys.
template <typename KeyMatrix>
void score(const PreparedCall& call, const Shares& shares, const Workspace& workspace, const KeyMatrix& key) {
  using Kernels = KeyKernels<KeyMatrix>;
  Kernels::score_few(call.variant(Kernels::kScoreFew), call.place, shares.scoring(),
                     {
                         .query = matrix_of(call.query),
                         .key = key,
                         .scores = workspace.write(kScores),
                         .tile_max = workspace.write(kTileMax),
                         .call = call.arguments,
                         .few = shares.argument,
                     });
}

// Scores, of the keys that an index leaves.
template <typename KeyMatrix>
void score_indexed(const PreparedCall& call, const Shares& shares, const Workspace& workspace, const KeyMatrix& key,
                   const KeyIndex& index, int64_t query_rows) {
  using Kernels = KeyKernels<KeyMatrix>;
  turn_queries(call.variant_of_turns(Kernel::kTurnQueries), call.place, query_rows,
               {
                   .query = matrix_of(call.query),
                   .index = index,
                   .planes = workspace.write(kTurned),
                   .terms = workspace.write(kTurnedTerms),
                   .call = call.arguments,
                   .few = shares.argument,
               });
  const Variant& scan = call.variant_of_turns(Kernels::kScanIndex);
  const int64_t scan_blocks = in_blocks(shares.rows, scan.block_m) * call.kv_heads;
  Kernels::scan_index(scan, call.place, shares.argument.scorers.value * scan_blocks,
                      {
                          .key = key,
                          .index = index,
                          .planes = workspace.read(kTurned),
                          .terms = workspace.read(kTurnedTerms),
                          .scores = workspace.write(kScores),
                          .tile_max = workspace.write(kTileMax),
                          .tile_bounds = workspace.write(kTileBounds),
                          .floors = workspace.write(kFloors),
                          .call = call.arguments,
                          .few = shares.argument,
                      });
  const int64_t scorers = in_blocks(shares.argument.scorers.value, kScorersTogether);
  Kernels::score_found(call.variant(Kernels::kScoreFound), call.place, scorers * shares.score_blocks,
                       {
                           .query = matrix_of(call.query),
                           .key = key,
                           .floors = workspace.read(kFloors),
                           .found = workspace.write(kFound),
                           .scores = workspace.write(kScores),
                           .tile_max = workspace.write(kTileMax),
                           .tile_bounds = workspace.read(kTileBounds),
                           .call = call.arguments,
                           .few = shares.argument,
                       });
}

template <typename KeyMatrix>
void solve(const PreparedCall& call, const Shares& shares, const Workspace& workspace, const KeyMatrix& value,
           const MutableMatrix& out, float* row_state, int32_t* tiles, int64_t query_rows) {
  using Kernels = KeyKernels<KeyMatrix>;
  Kernels::solve_few(call.variant(Kernels::kSolveFew), call.place, query_rows,
                     {
                         .value = value,
                         .out = out,
                         .row_state = row_state,
                         .tiles = tiles,
                         .scores = workspace.read(kScores),
                         .tile_max = workspace.read(kTileMax),
                         .tile_lists = workspace.write(kFewTileLists),
                         .listed_scores = workspace.write(kListedScores),
                         .listed_keys = workspace.write(kListedKeys),
                         .is_long = workspace.write(kIsLong),
                         .call = call.arguments,
                         .few = shares.argument,
                     });
}

template <typename KeyMatrix>
void weigh(const PreparedCall& call, const Shares& shares, const Workspace& workspace, const KeyMatrix& value,
           const float* row_state, int32_t* tiles) {
  using Kernels = KeyKernels<KeyMatrix>;
  Kernels::weigh_few(call.variant(Kernels::kWeighFew), call.place, shares.weighing(),
                     {
                         .value = value,
                         .row_state = row_state,
                         .tiles = tiles,
                         .scores = workspace.read(kScores),
                         .tile_max = workspace.read(kTileMax),
                         .is_long = workspace.read(kIsLong),
                         .weighted = workspace.write(kWeighted),
                         .weight_sums = workspace.write(kWeightSums),
                         .call = call.arguments,
                         .few = shares.argument,
                     });
}

}  // namespace

void attend_few(const PreparedCall& call, const FewQueries& few, const Workspace& workspace, const at::Tensor& out,
                float* row_state, int32_t* tiles) {
  const int64_t query_rows = few.queries() * call.heads;
  const MutableMatrix out_rows = mutable_matrix_of(out);  // refused, if at all, before anything is launched
  // Only with the memory that it takes: the environment, which has a say in it, may have changed meanwhile.
  const auto index = workspace.write(kTurned) ? call.key_index() : std::nullopt;
  call.over_keys_of_few([&]<typename KeyMatrix>(const KeyMatrix& key, const KeyMatrix& value) {
    using Kernels = KeyKernels<KeyMatrix>;
    const Shares shares(call, few, call.variant(Kernels::kScoreFew), call.variant(Kernels::kWeighFew),
                        tiles != nullptr);
    if constexpr (Kernels::kReadsIndex) {
      if (index) {
        score_indexed(call, shares, workspace, key, *index, query_rows);
      } else {
        score(call, shares, workspace, key);
      }
    } else {
      score(call, shares, workspace, key);
    }
    call.over_keys([&](const auto&, const auto& rows) {
      solve(call, shares, workspace, rows, out_rows, row_state, tiles, query_rows);
    });
    weigh(call, shares, workspace, value, row_state, tiles);
    join_few(call.variant(Kernel::kJoinFew), call.place, query_rows,
             {
                 .weighted = workspace.read(kWeighted),
                 .weight_sums = workspace.read(kWeightSums),
                 .is_long = workspace.read(kIsLong),
                 .out = out_rows,
                 .call = call.arguments,
                 .few = shares.argument,
             });
  });
}

}  // namespace adasplash::cuda::portable

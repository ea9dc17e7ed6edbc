// The forward of the portable kernels: `attend`, and the launches of few.h for sequences of few queries.
#include "cuda/gathering.h"
#include "cuda/portable/call.h"
#include "cuda/portable/few.h"
#include "cuda/portable/portable.h"

namespace adasplash::cuda::portable {
namespace {

// Where keys are gathered, their marks come in the place of margins.
constexpr Piece<int16_t> kTileMargins{"tile_margins", 4, &Extents::query_tile_pairs};
constexpr Piece<int32_t> kTileLists{"tile_lists", 1, &Extents::query_tile_pairs};
// Inference keeps nothing, but the kernels write this in any case; no tile bits.
constexpr Piece<float> kRowState{"row_state", 2, &Extents::state_rows};

constexpr Scratch kAttendScratch = {kTileMargins, kTileLists};

// To gather keys, also how many candidates there are of tile rows whose keys are gathered, and how many of them inner;
// and the keys that are visited.
constexpr Piece<int32_t> kRemaining{"remaining", 2, &Extents::query_tile_rows};
constexpr Piece<int32_t> kGathered{"gathered", kGatherRoom, &Extents::query_tile_rows};
constexpr Scratch kGatheringScratch = {kRemaining, kGathered};

constexpr Scratch kFewScratch = {kScores,     kTileMax, kFewTileLists, kListedScores,
                                 kListedKeys, kIsLong,  kWeighted,     kWeightSums};
constexpr Scratch kIndexScratch = {kTurned, kTurnedTerms, kTileBounds, kFloors, kFound};

int32_t* data_if_defined(const at::Tensor& t) { return t.defined() ? t.mutable_data_ptr<int32_t>() : nullptr; }

// The launches over all keys of sequences that do not have few queries.
class Attend {
 public:
  Attend(const PreparedCall& call, const Gathering& gathering, const Workspace& workspace, const at::Tensor& out,
         float* row_state, const ForwardOutputs& outputs, int32_t support_capacity)
      : call_(call),
        gathering_(gathering),
        workspace_(workspace),
        out_(out),
        row_state_(row_state),
        support_(outputs.support),
        support_capacity_(support_capacity),
        tiles_(outputs.tiles),
        arguments_(call.arguments) {
    if (!tiles_.defined()) arguments_.tile_words = {0};
  }

  // In long sequences the first launch leaves blocks of rows that weigh few keys to the second, which gathers these.
  // Only the GPU knows which, and programs that have nothing to do return at once.
  void run() const {
    call_.over_keys([&]<typename KeyMatrix>(const KeyMatrix& key, const KeyMatrix& value) {
      launch(key, value, false);
      if (gathering_.possible()) launch(key, value, true);
    });
  }

 private:
  template <typename KeyMatrix>
  void launch(const KeyMatrix& key, const KeyMatrix& value, bool gather) const {
    using Kernels = KeyKernels<KeyMatrix>;
    const Variant& variant = call_.variant(Kernels::kAttend, gather);
    Kernels::attend(variant, call_.place, call_.query_programs(variant),
                    {
                        .query = matrix_of(call_.query),
                        .key = key,
                        .value = value,
                        .out = mutable_matrix_of(out_),
                        .row_state = row_state_,
                        .support = data_if_defined(support_),
                        .tiles = data_if_defined(tiles_),
                        .support_capacity = support_capacity_,
                        .tile_margins = workspace_.write(kTileMargins),
                        .tile_lists = workspace_.write(kTileLists),
                        .remaining = workspace_.write(kRemaining),
                        .gathered = workspace_.write(kGathered),
                        .gather_from = gathering_.possible() ? gathering_.from : kUnlimited,
                        .gather_below = gathering_.below,
                        .call = arguments_,
                    });
  }

  const PreparedCall& call_;
  const Gathering& gathering_;
  const Workspace& workspace_;
  const at::Tensor& out_;
  float* const row_state_;
  const at::Tensor& support_;
  const int32_t support_capacity_;
  const at::Tensor& tiles_;
  Call arguments_;
};

}  // namespace

Scratch Portable::forward_scratch(const AttentionInputs& inputs, bool training) const {
  const FewQueries few = FewQueries::of(inputs);
  Scratch scratch;
  if (!training) scratch += {kRowState};
  if (!few.all()) {
    scratch += kAttendScratch;
    if (Gathering::of_forward(inputs).possible()) scratch += kGatheringScratch;
  }
  if (few.some()) {
    scratch += kFewScratch;
    if (uses_index(inputs)) scratch += kIndexScratch;
  }
  return scratch;
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
    const int32_t support_capacity = Gathering::capacity_of(outputs.support, inputs);
    Attend(call, Gathering::of_forward(inputs), workspace, out.rows, row_state, outputs, support_capacity).run();
  }
  if (few.some()) {
    attend_few(call, few, workspace, out.rows, row_state, data_if_defined(outputs.tiles));
  }
  out.finish();
}

}  // namespace adasplash::cuda::portable

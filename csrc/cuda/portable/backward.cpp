// The backward of the portable kernels: `grad_query`, then `grad_key_value`. Of long sequences `mark` comes first, for
// what the forward has kept no marks of, and then both have two launches: one with code that gathers the keys or rows
// that were marked, one with code that walks whole tiles. Of each key head one of the two does the work; only the GPU
// knows which, and the other returns at once.
#include <ATen/ops/zeros_like.h>

#include "cuda/gathering.h"
#include "cuda/portable/call.h"
#include "cuda/portable/portable.h"

namespace adasplash::cuda::portable {
namespace {

// What grad_query leaves of each row for grad_key_value: the threshold as two numbers, delta, and the normaliser.
constexpr Piece<float> kRowTerms{"row_terms", 4, &Extents::state_rows};
constexpr Piece<int32_t> kTileLists{"tile_lists", 1, &Extents::tile_pairs};
constexpr Scratch kWalkingScratch = {kRowTerms, kTileLists};

// With dropout also what the row's weights are dropped by.
constexpr Piece<int64_t> kRowSeeds{"row_seeds", 1, &Extents::state_rows};

// To gather, also for each key head how many probed keys weigh and how many there were; and one bit for each of the 64
// keys of a tile, which `mark` writes 16 at a time and grad_query reads as words, and for each of its 64 rows, which
// `mark` begins, grad_query adds to and grad_key_value reads; and the keys or rows that are visited.
constexpr Piece<int32_t> kGathered{"gathered", kGatherRoom, &Extents::tile_rows};
constexpr Piece<int32_t> kProbeCounts{"probe_counts", 2, &Extents::kv_heads};
constexpr Piece<int32_t> kKeyMarks{"key_marks", 2, &Extents::query_tile_pairs};
constexpr Piece<int32_t> kRowMarks{"row_marks", 2, &Extents::query_tile_pairs};
constexpr Scratch kGatheringScratch = {kGathered, kProbeCounts, kKeyMarks, kRowMarks};

Scratch scratch_for(const Gathering& gathering, const AttentionOptions& options) {
  Scratch scratch = kWalkingScratch;
  if (options.dropout_p > 0) scratch += {kRowSeeds};
  if (gathering.possible()) scratch += kGatheringScratch;
  return scratch;
}

// The launches of one part, and what several of them are given.
class Backward {
 public:
  Backward(const AttentionInputs& inputs, const BackwardInputs& saved, const BackwardOutputs& outputs)
      : call_(inputs),
        grad_query_(outputs.grad_query),
        grad_key_(outputs.grad_key),
        grad_value_(outputs.grad_value),
        grad_out_(with_aligned_rows(saved.grad_out)),
        out_(with_aligned_rows(saved.out ? *saved.out : at::zeros_like(saved.grad_out))),
        row_state_(saved.row_state.const_data_ptr<float>()),
        support_(saved.support.const_data_ptr<int32_t>()),
        support_capacity_(Gathering::capacity_of(saved.support, inputs)),
        tiles_(saved.tiles.const_data_ptr<int32_t>()),
        alpha_terms_(outputs.alpha_terms.mutable_data_ptr<float>()),
        gathering_(Gathering::of_backward(inputs)),
        workspace_(scratch_for(gathering_, inputs.options), call_.extents(), call_.query) {}

  void run() const {
    // Nobody writes the terms of tokens that no sequence has.
    if (call_.packed) workspace_.zero(kRowTerms);
    const bool may_gather = gathering_.possible();
    if (may_gather) mark_what_weighs();
    if (call_.query.numel() > 0) {
      compute_grad_query(false);
      if (may_gather) compute_grad_query(true);
    }
    if (call_.key.numel() > 0) {
      compute_grad_key_value(false);
      if (may_gather) compute_grad_key_value(true);
    }
    for (const AlignedResult* result : {&grad_query_, &grad_key_, &grad_value_}) result->finish();
  }

 private:
  // First as a probe, which counts for each key head what weighs in some of its tiles; then `mark` proper, of the key
  // heads where gathering pays.
  void mark_what_weighs() const {
    workspace_.zero(kProbeCounts);
    const Variant& variant = call_.variant(Kernel::kMark);
    const int64_t blocks = call_.query_programs(variant) / call_.heads;
    launch_mark(variant, (blocks + kProbeEvery - 1) / kProbeEvery * call_.heads, gathering_.from);
    launch_mark(variant, blocks * call_.heads, 0);
  }

  // A probe of sequences of at least some length, or, with 0, no probe.
  void launch_mark(const Variant& variant, int64_t programs, int32_t length_to_probe) const {
    mark(variant, call_.place, programs,
         {
             .query = matrix_of(call_.query),
             .key = matrix_of(call_.key),
             .row_state = row_state_,
             .support = support_,
             .tiles = tiles_,
             .support_capacity = support_capacity_,
             .tile_lists = workspace_.write(kTileLists),
             .key_marks = workspace_.write(kKeyMarks),
             .row_marks = reinterpret_cast<int16_t*>(workspace_.write(kRowMarks)),
             .probe_counts = workspace_.write(kProbeCounts),
             .gather_below = gathering_.below,
             .probe_from = length_to_probe,
             .call = call_.arguments,
         });
  }

  void compute_grad_query(bool gather) const {
    const Variant& variant = call_.variant(Kernel::kGradQuery, gather);
    grad_query(variant, call_.place, call_.query_programs(variant),
               {
                   .query = matrix_of(call_.query),
                   .key = matrix_of(call_.key),
                   .value = matrix_of(call_.value),
                   .out = matrix_of(out_),
                   .grad_out = matrix_of(grad_out_),
                   .grad_query = mutable_matrix_of(grad_query_.rows),
                   .row_terms = workspace_.write(kRowTerms),
                   .row_seeds = workspace_.write(kRowSeeds),
                   .alpha_terms = alpha_terms_,
                   .row_state = row_state_,
                   .support = support_,
                   .tiles = tiles_,
                   .support_capacity = support_capacity_,
                   .tile_lists = workspace_.write(kTileLists),
                   .key_marks = workspace_.read(kKeyMarks),
                   .row_marks = workspace_.write(kRowMarks),
                   .gathered = workspace_.write(kGathered),
                   .probe_counts = workspace_.read(kProbeCounts),
                   .gather_below = gathering_.below,
                   .call = call_.arguments,
               });
  }

  void compute_grad_key_value(bool gather) const {
    const Variant& variant = call_.variant(Kernel::kGradKeyValue, gather);
    grad_key_value(variant, call_.place, call_.key_programs(variant),
                   {
                       .query = matrix_of(call_.query),
                       .key = matrix_of(call_.key),
                       .value = matrix_of(call_.value),
                       .grad_out = matrix_of(grad_out_),
                       .grad_key = mutable_matrix_of(grad_key_.rows),
                       .grad_value = mutable_matrix_of(grad_value_.rows),
                       .row_terms = workspace_.read(kRowTerms),
                       .row_seeds = workspace_.read(kRowSeeds),
                       .tiles = tiles_,
                       .tile_lists = workspace_.write(kTileLists),
                       .marks = workspace_.read(kRowMarks),
                       .gathered = workspace_.write(kGathered),
                       .probe_counts = workspace_.read(kProbeCounts),
                       .gather_below = gathering_.below,
                       .call = call_.arguments,
                   });
  }

  const PreparedCall call_;
  const AlignedResult grad_query_, grad_key_, grad_value_;
  const at::Tensor grad_out_, out_;
  const float* const row_state_;
  const int32_t* const support_;
  const int32_t support_capacity_;
  const int32_t* const tiles_;
  float* const alpha_terms_;
  const Gathering gathering_;
  const Workspace workspace_;
};

}  // namespace

Scratch Portable::backward_scratch(const AttentionInputs& inputs) const {
  return scratch_for(Gathering::of_backward(inputs), inputs.options);
}

void Portable::backward(const AttentionInputs& inputs, const BackwardInputs& saved,
                        const BackwardOutputs& outputs) const {
  Backward(inputs, saved, outputs).run();
}

}  // namespace adasplash::cuda::portable

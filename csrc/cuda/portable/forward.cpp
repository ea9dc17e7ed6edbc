// _entmax_attn_forward on the GPU.
#include "cuda/ops.h"
#include "cuda/part.h"
#include "cuda/portable/call.h"
#include "ops/attention_checks.h"

namespace adasplash::cuda {

namespace {

// Four numbers of 16 bits, and an entry of a list.
constexpr Scratch kScratch{.of_pair = 2 + 1, .of_tile_row = 0};

// The output of one part's heads, and in training their row_state and tile bits; else these are undefined.
void forward_part(const Call& call, const at::Tensor& out, const at::Tensor& state, const at::Tensor& tiles) {
  if (out.numel() == 0) return;
  const Result weighted(out);
  if (call.packed) weighted.rows.zero_();  // tokens that no sequence has, where lengths contradict the tensors
  // One tensor for all that is not kept: to allocate is much of what the host does for a small call.
  const bool training = state.defined();
  const int64_t pairs = call.query_tile_pairs();
  const int64_t state_size = training ? 0 : 2 * call.state_rows(), words = training ? 0 : call.tile_words();
  const at::Tensor scratch = call.empty_ints(kScratch.of_pair * pairs + state_size + words);
  int32_t* const numbers = scratch.mutable_data_ptr<int32_t>();  // four of 16 bits a pair
  int32_t* const scratch_state = numbers + 2 * pairs;
  int32_t* const lists = scratch_state + state_size;
  int32_t* const scratch_tiles = lists + pairs;

  const Variant& variant = call.variant(Kernel::kAttend);
  attend(variant, call.place, call.query_programs(variant),
         {
             .query = rows_of(call.query),
             .key = rows_of(call.key),
             .value = rows_of(call.value),
             .out = mutable_rows_of(weighted.rows),
             .row_state = training ? state.mutable_data_ptr<float>() : reinterpret_cast<float*>(scratch_state),
             .tiles = training ? tiles.mutable_data_ptr<int32_t>() : scratch_tiles,
             .numbers = reinterpret_cast<int16_t*>(numbers),
             .lists = lists,
             .call = call.arguments,
         });
  weighted.finish();
}

}  // namespace

ForwardResult forward(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                      const AttentionOptions& options, const c10::SymInt& support_capacity) {
  constexpr const char* name = "_entmax_attn_forward";
  check_attention(name, query, key, value, options);
  auto result = allocate_forward(query, key, value, options, support_capacity);
  auto& [out, state, support, tiles] = result;
  const bool training = support_capacity >= 0;
  if (training) {
    // attend writes the tile rows of all queries; others round the shape up, or lie between packed sequences.
    const int64_t queries = AttentionShape::of(query, key, value, options).queries.expect_int();
    if (options.packed() || tiles.size(-2) > count_tiles(queries)) tiles.zero_();
    if (options.packed()) state.zero_();                       // as out is
    if (support.numel() > 0) support.fill_(kSupportOverflow);  // its rows are not listed here: the backward walks tiles
  }
  for (const Part& part : Part::all(query, key, options, kScratch)) {
    const Call call(name, part.queries(query), part.keys(key), part.keys(value), part.options(options));
    forward_part(call, part.queries(out), training ? part.rows(state) : at::Tensor(),
                 training ? part.rows(tiles) : at::Tensor());
  }
  return result;
}

}  // namespace adasplash::cuda

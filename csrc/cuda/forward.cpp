// _entmax_attn_forward on the GPU.
#include <ATen/ops/empty.h>

#include "checks.h"
#include "cuda/call.h"
#include "cuda/ops.h"
#include "cuda/part.h"

namespace adasplash::cuda {

namespace {

// The output, row_state and tile bits of one part's heads.
void forward_part(const Call& call, const at::Tensor& out, const at::Tensor& state, const at::Tensor& tiles) {
  if (out.numel() == 0) return;
  const Result weighted(out);
  if (call.packed) weighted.rows.zero_();  // tokens that no sequence has, where lengths contradict the tensors
  const at::Tensor numbers = call.empty_by_query_tile(at::kLong);  // four of 16 bits
  const at::Tensor lists = call.empty_by_query_tile(at::kInt);

  const Variant& variant = call.variant(Kernel::kAttend);
  attend(variant, call.place, call.query_programs(variant),
         {
             .query = rows_of(call.query),
             .key = rows_of(call.key),
             .value = rows_of(call.value),
             .out = mutable_rows_of(weighted.rows),
             .row_state = state.mutable_data_ptr<float>(),
             .tiles = tiles.mutable_data_ptr<int32_t>(),
             .numbers = static_cast<int16_t*>(numbers.mutable_data_ptr()),
             .lists = lists.mutable_data_ptr<int32_t>(),
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
  auto& [out, saved_state, support, saved_tiles] = result;

  // The kernels need both, whether they are kept or not.
  const SavedSizes sizes = saved_sizes(query, key, options, 0);
  const bool training = support_capacity >= 0;
  const at::Tensor state = training ? saved_state : at::empty_symint(sizes.row_state, saved_state.options());
  const at::Tensor tiles = training ? saved_tiles : at::empty_symint(sizes.tiles, saved_tiles.options());
  // attend writes the tile rows of all queries; others round the shape up, or lie between packed sequences.
  const int64_t queries = AttentionShape::of(query, key, value, options).queries.expect_int();
  if (options.packed() || sizes.tiles.rbegin()[1].expect_int() > count_tiles(queries)) tiles.zero_();
  if (options.packed()) state.zero_();                       // as out is
  if (support.numel() > 0) support.fill_(kSupportOverflow);  // its rows are never listed here; the backward walks tiles
  for (const Part& part : Part::all(query, key, options)) {
    const Call call(name, part.queries(query), part.keys(key), part.keys(value), part.options(options));
    forward_part(call, part.queries(out), part.rows(state), part.rows(tiles));
  }
  return result;
}

}  // namespace adasplash::cuda

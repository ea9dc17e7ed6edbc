// _entmax_attn_backward on the GPU.
#include <ATen/ops/empty.h>

#include "checks.h"
#include "cuda/call.h"
#include "cuda/ops.h"

namespace adasplash::cuda {

BackwardResult backward(const at::Tensor& given_grad, const at::Tensor& query, const at::Tensor& key,
                        const at::Tensor& value, const SavedForBackward& saved, const AttentionOptions& options) {
  constexpr const char* name = "_entmax_attn_backward";
  check_backward(given_grad, query, key, value, saved, options);
  check_available(name, options);
  const Call call(name, query, key, value, options);
  auto result = allocate_backward(query, key, value, options);
  auto& [dq, dk, dv, dalpha] = result;
  const at::Tensor grad_out = with_dense_rows(given_grad), state = saved.row_state.contiguous(),
                   tiles = saved.tiles.contiguous();
  const at::Tensor delta = at::empty({call.heads, query.size(2)}, state.options());
  const at::Tensor lists = call.empty_per_tile(at::kInt);

  if (dq.numel() > 0) {
    const Variant& variant = call.variant(Kernel::kGradQuery, {grad_out, dq});
    grad_query(variant, call.place, call.query_programs(variant),
               {
                   .query = rows_of(call.query),
                   .key = rows_of(call.key),
                   .value = rows_of(call.value),
                   .grad_out = rows_of(grad_out),
                   .grad_query = mutable_rows_of(dq),
                   .delta = delta.mutable_data_ptr<float>(),
                   .row_state = state.const_data_ptr<float>(),
                   .tiles = tiles.const_data_ptr<int32_t>(),
                   .lists = lists.mutable_data_ptr<int32_t>(),
                   .lengths_q = Call::kNoLengths,
                   .lengths_k = Call::kNoLengths,
                   .state_batch = call.state_batch,
                   .shape = call.shape,
               });
  }
  if (call.heads == 0) {  // keys that no head asks for
    dk.zero_();
    dv.zero_();
  } else if (dk.numel() > 0) {
    const Variant& variant = call.variant(Kernel::kGradKeyValue, {grad_out, dk, dv});
    grad_key_value(variant, call.place, call.key_programs(variant),
                   {
                       .query = rows_of(call.query),
                       .key = rows_of(call.key),
                       .value = rows_of(call.value),
                       .grad_out = rows_of(grad_out),
                       .grad_key = mutable_rows_of(dk),
                       .grad_value = mutable_rows_of(dv),
                       .delta = delta.const_data_ptr<float>(),
                       .row_state = state.const_data_ptr<float>(),
                       .tiles = tiles.const_data_ptr<int32_t>(),
                       .lists = lists.mutable_data_ptr<int32_t>(),
                       .lengths_q = Call::kNoLengths,
                       .lengths_k = Call::kNoLengths,
                       .state_batch = call.state_batch,
                       .shape = call.shape,
                   });
  }
  return result;
}

}  // namespace adasplash::cuda

// _entmax_attn_backward on the GPU.
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros_like.h>

#include "checks.h"
#include "cuda/call.h"
#include "cuda/ops.h"

namespace adasplash::cuda {
namespace {

// The gradient of alpha from what each row adds to it.
void sum_to_alpha(const at::Tensor& rows, const at::Tensor& query, const at::Tensor& dalpha) {
  if (rows.numel() == 0) {
    dalpha.zero_();
  } else if (dalpha.dim() == 0) {
    dalpha.copy_(rows.sum());
  } else if (query.dim() == 3) {
    dalpha.copy_(rows.view({query.size(1), -1}).sum(1));
  } else {
    dalpha.copy_(rows.view({query.size(0), query.size(1), -1}).sum(at::IntArrayRef({0, 2})));
  }
}

}  // namespace

BackwardResult backward(const at::Tensor& given_grad, const at::Tensor& query, const at::Tensor& key,
                        const at::Tensor& value, const SavedForBackward& saved, const AttentionOptions& options) {
  constexpr const char* name = "_entmax_attn_backward";
  check_backward(given_grad, query, key, value, saved, options);
  const Call call(name, query, key, value, options);
  auto result = allocate_backward(query, key, value, options);
  auto& [dq, dk, dv, dalpha] = result;
  const Result of_query(dq), of_key(dk), of_value(dv);
  const at::Tensor grad_out = with_aligned_rows(given_grad),
                   out = with_aligned_rows(saved.out ? *saved.out : at::zeros_like(given_grad)),
                   state = saved.row_state.contiguous(), tiles = saved.tiles.contiguous();
  const at::Tensor terms = at::empty({call.queries, 4}, state.options()),
                   alpha_terms = at::empty({options.head_alpha ? call.queries : 0}, state.options());
  if (options.packed()) {  // tokens that no sequence has, where lengths contradict the tensors
    for (const at::Tensor& t : {of_query.rows, of_key.rows, of_value.rows, terms, alpha_terms}) t.zero_();
  }

  if (dq.numel() > 0) {
    const Variant& variant = call.variant(Kernel::kGradQuery);
    const at::Tensor lists = call.empty_by_query_tile(at::kInt);
    grad_query(variant, call.place, call.query_programs(variant),
               {
                   .query = rows_of(call.query),
                   .key = rows_of(call.key),
                   .value = rows_of(call.value),
                   .out = rows_of(out),
                   .grad_out = rows_of(grad_out),
                   .grad_query = mutable_rows_of(of_query.rows),
                   .terms = terms.mutable_data_ptr<float>(),
                   .alpha_terms = alpha_terms.mutable_data_ptr<float>(),
                   .row_state = state.const_data_ptr<float>(),
                   .tiles = tiles.const_data_ptr<int32_t>(),
                   .lists = lists.mutable_data_ptr<int32_t>(),
                   .call = call.arguments,
               });
  }
  if (call.heads == 0) {  // keys that no head asks for
    of_key.rows.zero_();
    of_value.rows.zero_();
  } else if (dk.numel() > 0) {
    const Variant& variant = call.variant(Kernel::kGradKeyValue);
    const at::Tensor lists = call.empty_by_key_tile(at::kInt);
    grad_key_value(variant, call.place, call.key_programs(variant),
                   {
                       .query = rows_of(call.query),
                       .key = rows_of(call.key),
                       .value = rows_of(call.value),
                       .grad_out = rows_of(grad_out),
                       .grad_key = mutable_rows_of(of_key.rows),
                       .grad_value = mutable_rows_of(of_value.rows),
                       .terms = terms.const_data_ptr<float>(),
                       .tiles = tiles.const_data_ptr<int32_t>(),
                       .lists = lists.mutable_data_ptr<int32_t>(),
                       .call = call.arguments,
                   });
  }
  for (const Result* gradient : {&of_query, &of_key, &of_value}) gradient->finish();
  if (options.head_alpha) sum_to_alpha(dq.numel() > 0 ? alpha_terms : alpha_terms.zero_(), query, dalpha);
  return result;
}

}  // namespace adasplash::cuda

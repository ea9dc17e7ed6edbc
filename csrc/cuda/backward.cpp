// _entmax_attn_backward on the GPU.
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros_like.h>

#include "checks.h"
#include "cuda/call.h"
#include "cuda/ops.h"
#include "cuda/part.h"

namespace adasplash::cuda {
namespace {

// The gradient of alpha from what each row adds to it.
void sum_to_alpha(const at::Tensor& rows, const at::Tensor& dalpha) {  // (B, H, M), or packed (H, M)
  if (rows.numel() == 0) {
    dalpha.zero_();
  } else if (dalpha.dim() == 0) {
    dalpha.copy_(rows.sum());
  } else if (rows.dim() == 2) {
    dalpha.copy_(rows.sum(1));
  } else {
    dalpha.copy_(rows.sum(at::IntArrayRef({0, 2})));
  }
}

// A row's share of what the kernels hand on to each other: (high, low, delta, share), and of the gradient of alpha.
struct OfRows {
  at::Tensor terms, alpha_terms;
};

// The gradients of one part's heads.
void backward_part(const Call& call, const at::Tensor& given_grad, const SavedForBackward& saved, const OfRows& of_rows,
                   const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& dv) {
  const Result of_query(dq), of_key(dk), of_value(dv);
  const at::Tensor grad_out = with_aligned_rows(given_grad),
                   out = with_aligned_rows(saved.out ? *saved.out : at::zeros_like(given_grad));
  if (call.packed) {  // tokens that no sequence has, where lengths contradict the tensors
    for (const at::Tensor& t : {of_query.rows, of_key.rows, of_value.rows}) t.zero_();
  }

  if (dq.numel() > 0) {
    const Variant& variant = call.variant(Kernel::kGradQuery);
    const at::Tensor lists = call.empty_ints(call.query_tile_pairs());
    grad_query(variant, call.place, call.query_programs(variant),
               {
                   .query = rows_of(call.query),
                   .key = rows_of(call.key),
                   .value = rows_of(call.value),
                   .out = rows_of(out),
                   .grad_out = rows_of(grad_out),
                   .grad_query = mutable_rows_of(of_query.rows),
                   .terms = of_rows.terms.mutable_data_ptr<float>(),
                   .alpha_terms = of_rows.alpha_terms.mutable_data_ptr<float>(),
                   .row_state = saved.row_state.const_data_ptr<float>(),
                   .tiles = saved.tiles.const_data_ptr<int32_t>(),
                   .lists = lists.mutable_data_ptr<int32_t>(),
                   .call = call.arguments,
               });
  }
  if (call.heads == 0) {  // keys that no head asks for
    of_key.rows.zero_();
    of_value.rows.zero_();
  } else if (dk.numel() > 0) {
    const Variant& variant = call.variant(Kernel::kGradKeyValue);
    const at::Tensor lists = call.empty_ints(call.key_tile_pairs());
    grad_key_value(variant, call.place, call.key_programs(variant),
                   {
                       .query = rows_of(call.query),
                       .key = rows_of(call.key),
                       .value = rows_of(call.value),
                       .grad_out = rows_of(grad_out),
                       .grad_key = mutable_rows_of(of_key.rows),
                       .grad_value = mutable_rows_of(of_value.rows),
                       .terms = of_rows.terms.const_data_ptr<float>(),
                       .tiles = saved.tiles.const_data_ptr<int32_t>(),
                       .lists = lists.mutable_data_ptr<int32_t>(),
                       .call = call.arguments,
                   });
  }
  for (const Result* gradient : {&of_query, &of_key, &of_value}) gradient->finish();
}

}  // namespace

BackwardResult backward(const at::Tensor& grad_out, const at::Tensor& query, const at::Tensor& key,
                        const at::Tensor& value, const SavedForBackward& saved, const AttentionOptions& options) {
  constexpr const char* name = "_entmax_attn_backward";
  check_backward(grad_out, query, key, value, saved, options);
  auto result = allocate_backward(query, key, value, options);
  auto& [dq, dk, dv, dalpha] = result;
  const at::Tensor state = saved.row_state.contiguous(), tiles = saved.tiles.contiguous();
  at::DimVector rows(state.sizes().begin(), state.sizes().end() - 1), four(rows);
  four.push_back(4);
  const at::Tensor terms = at::empty(four, state.options()), alpha_terms = options.head_alpha
                                                                               ? at::empty(rows, state.options())
                                                                               : at::empty({0}, state.options());
  if (options.packed()) {
    terms.zero_();
    alpha_terms.zero_();
  }
  for (const Part& part : Part::all(query, key, options)) {
    const Call call(name, part.queries(query), part.keys(key), part.keys(value), part.options(options));
    const SavedForBackward of_part{
        part.rows(state), {}, part.rows(tiles), saved.out ? OptionalTensor(part.queries(*saved.out)) : std::nullopt};
    backward_part(call, part.queries(grad_out), of_part,
                  {part.rows(terms), options.head_alpha ? part.rows(alpha_terms) : alpha_terms}, part.queries(dq),
                  part.keys(dk), part.keys(dv));
  }
  if (options.head_alpha) sum_to_alpha(dq.numel() > 0 ? alpha_terms : alpha_terms.zero_(), dalpha);
  return result;
}

}  // namespace adasplash::cuda

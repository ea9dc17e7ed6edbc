// _entmax_attn_forward and _entmax_attn_backward on the GPU: checks, what every implementation needs, and the parts
// that the chosen one runs.
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <c10/core/DeviceGuard.h>

#include "cuda/gathering.h"
#include "cuda/implementation.h"
#include "cuda/ops.h"
#include "cuda/part.h"
#include "ops/attention_checks.h"

namespace adasplash::cuda {
namespace {

// The gradient of alpha from what each row adds to it, (B, H, M), or packed (H, M).
void sum_alpha_terms(const at::Tensor& alpha_terms, const at::Tensor& grad_alpha) {
  if (alpha_terms.numel() == 0) {
    grad_alpha.zero_();
  } else if (grad_alpha.dim() == 0) {
    grad_alpha.copy_(alpha_terms.sum());
  } else if (alpha_terms.dim() == 2) {
    grad_alpha.copy_(alpha_terms.sum(1));
  } else {
    grad_alpha.copy_(alpha_terms.sum(at::IntArrayRef({0, 2})));
  }
}

}  // namespace

c10::SymInt support_capacity(const at::Tensor& query, const at::Tensor& key, const AttentionOptions& options) {
  return Gathering::kept_capacity(query, key, options);
}

ForwardResult forward(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                      const AttentionOptions& options, const c10::SymInt& support_capacity) {
  const AttentionInputs inputs{"_entmax_attn_forward", query, key, value, options};
  check_attention(inputs.op, query, key, value, options);
  auto result = allocate_forward(query, key, value, options, support_capacity);
  auto& [out, row_state, support, tiles] = result;
  const Implementation& implementation = implementation_for(inputs);
  const c10::DeviceGuard guard(query.device());

  const bool training = support_capacity >= 0, packed = options.packed();
  if (packed) out.zero_();  // for tokens that no sequence has, where lengths contradict the tensors
  if (training) {
    if (packed) row_state.zero_();  // as the output is
    // Tile rows that no query has: the shape rounds up, and they lie between packed sequences.
    const int64_t queries = query.size(packed ? 0 : 2);
    if (packed || tiles.size(-2) > count_tiles(queries)) tiles.zero_();
    // Rows of support are not listed here; the backward goes by tiles, and by marks in the places behind this.
    if (support.numel() > 0) support.fill_(kSupportOverflow);
  }
  if (out.numel() == 0) return result;

  for (const Part& part : Part::all(inputs, implementation.forward_scratch(inputs, training))) {
    implementation.forward(
        {inputs.op, part.queries(query), part.keys(key), part.keys(value), part.options(options), part.first()},
        {part.queries(out), training ? part.rows(row_state) : at::Tensor(),
         training ? part.rows(support) : at::Tensor(), training ? part.rows(tiles) : at::Tensor()});
  }
  return result;
}

BackwardResult backward(const at::Tensor& grad_out, const at::Tensor& query, const at::Tensor& key,
                        const at::Tensor& value, const SavedForBackward& saved, const AttentionOptions& options) {
  const AttentionInputs inputs{"_entmax_attn_backward", query, key, value, options};
  check_backward(grad_out, query, key, value, saved, options);
  auto result = allocate_backward(query, key, value, options);
  auto& [grad_query, grad_key, grad_value, grad_alpha] = result;
  const Implementation& implementation = implementation_for(inputs);
  const c10::DeviceGuard guard(query.device());

  const at::Tensor row_state = saved.row_state.contiguous(), support = saved.support.contiguous(),
                   tiles = saved.tiles.contiguous();
  const at::Tensor alpha_terms = options.head_alpha
                                     ? at::empty(row_state.sizes().slice(0, row_state.dim() - 1), row_state.options())
                                     : at::empty({0}, row_state.options());
  const bool packed = options.packed();
  if (packed) {  // for tokens that no sequence has, where lengths contradict the tensors
    for (const at::Tensor& t : {grad_query, grad_key, grad_value, alpha_terms}) t.zero_();
  }
  const int64_t heads = AttentionShape::of(query, key, value, options).batch.expect_int() * query.size(1);
  if (options.kv_starts || heads == 0) {  // keys before the first of their sequence, or that no head asks for
    grad_key.zero_();
    grad_value.zero_();
  }
  if (heads > 0) {
    for (const Part& part : Part::all(inputs, implementation.backward_scratch(inputs))) {
      implementation.backward(
          {inputs.op, part.queries(query), part.keys(key), part.keys(value), part.options(options), part.first()},
          {part.queries(grad_out), part.rows(row_state), part.rows(support), part.rows(tiles),
           saved.out ? OptionalTensor(part.queries(*saved.out)) : std::nullopt},
          {part.queries(grad_query), part.keys(grad_key), part.keys(grad_value),
           options.head_alpha ? part.rows(alpha_terms) : alpha_terms});
    }
  }
  if (options.head_alpha) sum_alpha_terms(alpha_terms, grad_alpha);
  return result;
}

}  // namespace adasplash::cuda

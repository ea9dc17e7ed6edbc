#include "ops/attention.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>

namespace adasplash {
namespace {

template <typename Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

c10::SymInt ceil_div(const c10::SymInt& n, int64_t d) { return (n + (d - 1)) / d; }

}  // namespace

c10::SymDimVector out_sizes(const at::Tensor& query, const at::Tensor& value) {
  c10::SymDimVector sizes(query.sym_sizes().begin(), query.sym_sizes().end());
  sizes.back() = value.sym_size(-1);
  return sizes;
}

SavedSizes saved_sizes(const at::Tensor& query, const at::Tensor& key, const AttentionOptions& options,
                       const c10::SymInt& support_capacity) {
  // Tile rows and words come in pairs: torch.compile would guard on a size that can be 1, and compile again for
  // sequences of up to one tile.
  const auto words = [](const c10::SymInt& keys) { return 2 * ceil_div(keys, 2 * 32 * kTile); };
  const auto shape = AttentionShape::of(query, key, key, options);
  const auto &b = shape.batch, &h = shape.heads, &m = shape.queries;
  if (options.packed()) {
    const c10::SymInt longest = longest_sequence(options, options.max_seqlen_k, shape.keys);
    return {{h, m, 2}, {h, m, support_capacity}, {h, 2 * ceil_div(m / kTile + b, 2), words(longest)}};
  }
  return {{b, h, m, 2}, {b, h, m, support_capacity}, {b, h, 2 * ceil_div(m, 2 * kTile), words(shape.keys)}};
}

at::ScalarType row_state_type(const at::Tensor& query) {
  return query.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

ForwardResult allocate_forward(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                               const AttentionOptions& options, const c10::SymInt& support_capacity) {
  TORCH_CHECK(support_capacity >= kInference, "_entmax_attn_forward: support_capacity must be ", kInference,
              " (inference) or more, got ", support_capacity);
  at::Tensor out = at::empty_symint(out_sizes(query, value), query.options());
  const auto state = query.options().dtype(row_state_type(query));
  const auto integers = query.options().dtype(at::kInt);
  if (support_capacity < 0) {
    return {out, at::empty({0}, state), at::empty({0}, integers), at::empty({0}, integers)};
  }
  const SavedSizes sizes = saved_sizes(query, key, options, support_capacity);
  return {out, at::empty_symint(sizes.row_state, state), at::empty_symint(sizes.support, integers),
          at::empty_symint(sizes.tiles, integers)};
}

BackwardResult allocate_backward(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                 const AttentionOptions& options) {
  const auto contiguous = [](const at::Tensor& t) { return at::empty_symint(t.sym_sizes(), t.options()); };
  return {contiguous(query), contiguous(key), contiguous(value),
          options.head_alpha ? contiguous(*options.head_alpha)
                             : at::empty({0}, query.options().dtype(row_state_type(query)))};
}

std::array<int64_t, 2> window_pair(c10::IntArrayRef window) {
  TORCH_CHECK(window.size() == 2, "adasplash: window must be two numbers (left, right), got ", window);
  return {window[0], window[1]};
}

ForwardResult call_forward(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                           const AttentionOptions& o, c10::SymInt support_capacity) {
  using Signature = decltype(forward_op<ForwardKernel{}>);
  static const auto op = find_op<Signature>("adasplash::_entmax_attn_forward");
  return op.call(query, key, value, o.head_alpha, o.alpha, o.is_causal, o.scale, o.q_seqlens, o.kv_seqlens,
                 o.cu_seqlens_q, o.cu_seqlens_k, o.max_seqlen_q, o.max_seqlen_k, o.window, o.alibi_slopes,
                 std::move(support_capacity));
}

BackwardResult call_backward(const at::Tensor& grad_out, const at::Tensor& query, const at::Tensor& key,
                             const at::Tensor& value, const SavedForBackward& saved, const AttentionOptions& o) {
  using Signature = decltype(backward_op<BackwardKernel{}>);
  static const auto op = find_op<Signature>("adasplash::_entmax_attn_backward");
  return op.call(grad_out, query, key, value, saved.row_state, saved.support, saved.tiles, o.head_alpha, o.alpha,
                 o.is_causal, o.scale, o.q_seqlens, o.kv_seqlens, o.cu_seqlens_q, o.cu_seqlens_k, o.max_seqlen_q,
                 o.max_seqlen_k, o.window, o.alibi_slopes, saved.out);
}

}  // namespace adasplash
